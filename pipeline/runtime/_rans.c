/* rANS over static integer tables, one a channel or, by the two neighbours coded before, several; renormalised by bytes. rans_twin.py says the same in
 * Python and gives the same bytes.
 *
 * One C source for every CPython from 3.11 on (limited API). All sizes are checked before a loop starts and every index into a table
 * is masked or compared, so no payload and no table content can make it read or write out of bounds. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define LOWER ((uint64_t)1 << 40) /* from the first byte on, the state stays in [LOWER, 256 * LOWER) */
#define MAX_PRECISION 14
#define STATE_BYTES 8

typedef struct {
    Py_ssize_t plane, levels, width, contexts, channels;
    int precision;
} Layout;

/* Holds `contexts` rows of `levels` per channel in freqs (and starts), and as many of 2**precision in `wide`. Sets layout->channels. */
static int tables_fit(const Py_buffer *freqs, const Py_buffer *wide, Py_ssize_t wide_item, Layout *layout)
{
    if (layout->plane < 1 || layout->levels < 1 || layout->levels > 256 || layout->precision < 1 || layout->precision > MAX_PRECISION || layout->width < 1 ||
        layout->plane % layout->width || layout->contexts < 1 || layout->contexts > 2 * layout->levels)
        return 0;
    const Py_ssize_t rows = freqs->len / (2 * layout->levels);
    layout->channels = rows / layout->contexts;
    return freqs->len == rows * 2 * layout->levels && rows == layout->channels * layout->contexts && wide->len == (rows << layout->precision) * wide_item &&
           layout->channels <= PY_SSIZE_T_MAX / 2 / layout->plane;
}

#define MOST_SUMS 511 /* of two symbols */

/* The context that each sum of two neighbours stands for: looked up, since a division takes longer than all else that is done for a symbol. */
static void fill_contexts(uint16_t *of_sum, const Layout *layout)
{
    for (Py_ssize_t sum = 0; sum < 2 * layout->levels - 1; sum++)
        of_sum[sum] = (uint16_t)(sum * (layout->contexts - 1) / (2 * layout->levels - 1));
}

/* Which of a channel's tables codes the symbol at place `index` of its plane: the last for the first one, else by the sum of the symbols to the left and
 * above, the other standing in for one that is not there. All symbols before `here` are below `levels`. */
static inline Py_ssize_t context(const uint8_t *here, Py_ssize_t index, Py_ssize_t column, const Layout *layout, const uint16_t *of_sum)
{
    if (layout->contexts == 1)
        return 0;
    if (!index)
        return layout->contexts - 1;
    const uint8_t left = here[column ? -1 : -layout->width], above = here[index < layout->width ? -1 : -layout->width];
    return of_sum[left + above];
}

static PyObject *encode(PyObject *module, PyObject *args)
{
    Py_buffer symbols, freqs, starts, slots;
    Layout layout;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*nninn", &symbols, &freqs, &starts, &slots, &layout.plane, &layout.levels, &layout.precision, &layout.width,
                          &layout.contexts))
        return NULL;
    PyObject *payload = NULL;
    uint8_t *buffer = NULL;
    if (!tables_fit(&freqs, &slots, 2, &layout) || starts.len != freqs.len || symbols.len != layout.channels * layout.plane) {
        PyErr_SetString(PyExc_ValueError, "tables and symbols do not fit");
        goto done;
    }
    const Py_ssize_t capacity = 2 * symbols.len + STATE_BYTES; /* at most two bytes leave per symbol, whatever the tables hold */
    buffer = PyMem_Malloc((size_t)capacity);
    if (!buffer) {
        PyErr_NoMemory();
        goto done;
    }
    const uint8_t *symbol = symbols.buf;
    for (Py_ssize_t index = 0; index < symbols.len; index++) {
        if ((Py_ssize_t)symbol[index] >= layout.levels) {
            PyErr_SetString(PyExc_ValueError, "a symbol is out of range");
            goto done;
        }
    }
    uint8_t *out = buffer + capacity;
    const int precision = layout.precision;
    const uint32_t mask = ((uint32_t)1 << precision) - 1;
    const uint64_t unit = 256 * LOWER >> precision;
    uint16_t of_sum[MOST_SUMS];
    fill_contexts(of_sum, &layout);
    uint64_t state = 0;
    for (Py_ssize_t channel = layout.channels; channel-- > 0;) {
        for (Py_ssize_t index = layout.plane, column = 0; index-- > 0;) {
            column = (column ? column : layout.width) - 1;
            const uint8_t *here = symbol + channel * layout.plane + index;
            const Py_ssize_t row = channel * layout.contexts + context(here, index, column, &layout, of_sum);
            const uint16_t *freq = (const uint16_t *)freqs.buf + row * layout.levels;
            const uint16_t *start = (const uint16_t *)starts.buf + row * layout.levels;
            const uint16_t *slot = (const uint16_t *)slots.buf + (row << precision);
            const uint32_t s = *here;
            if (freq[s] == 0 || freq[s] > mask) {
                PyErr_SetString(PyExc_ValueError, "a frequency is out of range");
                goto done;
            }
            const uint64_t f = freq[s];
            while (state >= f * unit) {
                *--out = (uint8_t)state;
                state >>= 8;
            }
            /* Exact: (state + 1/2)/f is at least 1/(2f) away from an integer, and rounding moves it by less than 1/(8f) since state < 2^48.
             * The reciprocal does not wait for the state; a 64-bit integer division would, and takes several times as long. */
            const uint64_t quotient = (uint64_t)(((double)state + 0.5) * (1.0 / (double)f));
            state = (quotient << precision) + slot[(start[s] + (uint32_t)(state - quotient * f)) & mask];
        }
    }
    for (; state; state >>= 8)
        *--out = (uint8_t)state;
    payload = PyBytes_FromStringAndSize((const char *)out, buffer + capacity - out);
done:
    PyMem_Free(buffer);
    PyBuffer_Release(&symbols);
    PyBuffer_Release(&freqs);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&slots);
    return payload;
}

static PyObject *decode(PyObject *module, PyObject *args)
{
    Py_buffer payload, freqs, entries;
    Layout layout;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*nninn", &payload, &freqs, &entries, &layout.plane, &layout.levels, &layout.precision, &layout.width, &layout.contexts))
        return NULL;
    PyObject *symbols = NULL;
    if (!tables_fit(&freqs, &entries, 4, &layout)) {
        PyErr_SetString(PyExc_ValueError, "tables do not fit");
        goto done;
    }
    const uint8_t *in = payload.buf, *const end = in + payload.len;
    if (payload.len && !*in) {
        PyErr_SetString(PyExc_ValueError, "the first byte is zero");
        goto done;
    }
    symbols = PyBytes_FromStringAndSize(NULL, layout.channels * layout.plane);
    if (!symbols)
        goto done;
    uint8_t *here = (uint8_t *)PyBytes_AsString(symbols);
    const int precision = layout.precision;
    const uint32_t mask = ((uint32_t)1 << precision) - 1;
    uint16_t of_sum[MOST_SUMS];
    fill_contexts(of_sum, &layout);
    uint64_t state = 0;
    for (Py_ssize_t channel = 0; channel < layout.channels; channel++) {
        for (Py_ssize_t index = 0, column = 0; index < layout.plane; index++, here++) {
            const Py_ssize_t row = channel * layout.contexts + context(here, index, column, &layout, of_sum);
            column = column + 1 < layout.width ? column + 1 : 0;
            const uint16_t *freq = (const uint16_t *)freqs.buf + row * layout.levels;
            const uint32_t *entry = (const uint32_t *)entries.buf + (row << precision);
            while (state < LOWER && in < end)
                state = state << 8 | *in++;
            const uint32_t packed = entry[state & mask], s = packed & 255;
            if ((Py_ssize_t)s >= layout.levels) {
                PyErr_SetString(PyExc_ValueError, "a table names a symbol out of range");
                Py_DECREF(symbols);
                symbols = NULL;
                goto done;
            }
            *here = (uint8_t)s;
            state = (state >> precision) * freq[s] + (packed >> 8);
        }
    }
    if (state || in < end) {
        PyErr_SetString(PyExc_ValueError, "bytes are left over");
        Py_DECREF(symbols);
        symbols = NULL;
    }
done:
    PyBuffer_Release(&payload);
    PyBuffer_Release(&freqs);
    PyBuffer_Release(&entries);
    return symbols;
}

static PyMethodDef methods[] = {
    {"encode", encode, METH_VARARGS, "encode(symbols, freqs, starts, slots, plane, levels, precision, width, contexts) -> bytes"},
    {"decode", decode, METH_VARARGS, "decode(payload, freqs, entries, plane, levels, precision, width, contexts) -> bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rans", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rans(void)
{
    return PyModuleDef_Init(&module);
}
