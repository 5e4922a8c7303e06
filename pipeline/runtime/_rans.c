/* rANS over static per-channel integer tables, renormalised by bytes. rans_twin.py says the same in Python and gives the same bytes.
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

/* Holds one row of `levels` per channel in freqs (and starts), and one row of 2**precision per channel in `wide`. */
static int tables_fit(const Py_buffer *freqs, const Py_buffer *wide, Py_ssize_t wide_item, Py_ssize_t plane, Py_ssize_t levels, int precision,
                      Py_ssize_t *channels)
{
    if (plane < 1 || levels < 1 || levels > 256 || precision < 1 || precision > MAX_PRECISION)
        return 0;
    *channels = freqs->len / (2 * levels);
    return freqs->len == *channels * 2 * levels && wide->len == (*channels << precision) * wide_item && *channels <= PY_SSIZE_T_MAX / 2 / plane;
}

static PyObject *encode(PyObject *module, PyObject *args)
{
    Py_buffer symbols, freqs, starts, slots;
    Py_ssize_t plane, levels, channels;
    int precision;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*nni", &symbols, &freqs, &starts, &slots, &plane, &levels, &precision))
        return NULL;
    PyObject *payload = NULL;
    uint8_t *buffer = NULL;
    if (!tables_fit(&freqs, &slots, 2, plane, levels, precision, &channels) || starts.len != freqs.len || symbols.len != channels * plane) {
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
    uint8_t *out = buffer + capacity;
    const uint32_t mask = ((uint32_t)1 << precision) - 1;
    const uint64_t unit = 256 * LOWER >> precision;
    uint64_t state = 0;
    for (Py_ssize_t channel = channels; channel-- > 0;) {
        const uint16_t *freq = (const uint16_t *)freqs.buf + channel * levels;
        const uint16_t *start = (const uint16_t *)starts.buf + channel * levels;
        const uint16_t *slot = (const uint16_t *)slots.buf + (channel << precision);
        for (Py_ssize_t index = (channel + 1) * plane; index-- > channel * plane;) {
            const uint32_t s = symbol[index];
            if ((Py_ssize_t)s >= levels || freq[s] == 0 || freq[s] > mask) {
                PyErr_SetString(PyExc_ValueError, "a symbol is out of range");
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
    Py_ssize_t plane, levels, channels;
    int precision;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*nni", &payload, &freqs, &entries, &plane, &levels, &precision))
        return NULL;
    PyObject *symbols = NULL;
    if (!tables_fit(&freqs, &entries, 4, plane, levels, precision, &channels)) {
        PyErr_SetString(PyExc_ValueError, "tables do not fit");
        goto done;
    }
    const uint8_t *in = payload.buf, *const end = in + payload.len;
    if (payload.len && !*in) {
        PyErr_SetString(PyExc_ValueError, "the first byte is zero");
        goto done;
    }
    symbols = PyBytes_FromStringAndSize(NULL, channels * plane);
    if (!symbols)
        goto done;
    uint8_t *symbol = (uint8_t *)PyBytes_AsString(symbols);
    const uint32_t mask = ((uint32_t)1 << precision) - 1;
    uint64_t state = 0;
    for (Py_ssize_t channel = 0; channel < channels; channel++) {
        const uint16_t *freq = (const uint16_t *)freqs.buf + channel * levels;
        const uint32_t *entry = (const uint32_t *)entries.buf + (channel << precision);
        for (Py_ssize_t index = 0; index < plane; index++) {
            while (state < LOWER && in < end)
                state = state << 8 | *in++;
            const uint32_t packed = entry[state & mask], s = packed & 255;
            if ((Py_ssize_t)s >= levels) {
                PyErr_SetString(PyExc_ValueError, "a table names a symbol out of range");
                Py_DECREF(symbols);
                symbols = NULL;
                goto done;
            }
            *symbol++ = (uint8_t)s;
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
    {"encode", encode, METH_VARARGS, "encode(symbols, freqs, starts, slots, plane, levels, precision) -> bytes"},
    {"decode", decode, METH_VARARGS, "decode(payload, freqs, entries, plane, levels, precision) -> bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rans", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rans(void)
{
    return PyModuleDef_Init(&module);
}
