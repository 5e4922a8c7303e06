/* rANS over static integer tables, one a channel or several, chosen by what predictors make of the symbols coded before; renormalised by bytes.
 * rans_twin.py says the same in Python and gives the same bytes; context.py says what the predictors are.
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
/* As in context.py. */
#define SHIFT 10
#define MEANS 12
#define SPREADS 3
#define GROUP 32

typedef struct {
    Py_ssize_t plane, levels, width, contexts, channels;
    int precision;
} Layout;

/* Holds `contexts` rows of `levels` per channel in freqs (and starts), and as many of 2**precision in `wide`. Sets layout->channels. */
static int tables_fit(const Py_buffer *freqs, const Py_buffer *wide, Py_ssize_t wide_item, Layout *layout)
{
    if (layout->plane < 1 || layout->levels < 1 || layout->levels > 256 || layout->precision < 1 || layout->precision > MAX_PRECISION || layout->width < 1 ||
        layout->plane % layout->width || (layout->contexts != 1 && layout->contexts != MEANS * SPREADS))
        return 0;
    const Py_ssize_t rows = freqs->len / (2 * layout->levels);
    layout->channels = rows / layout->contexts;
    return layout->channels >= 1 && freqs->len == rows * 2 * layout->levels && rows == layout->channels * layout->contexts &&
           wide->len == (rows << layout->precision) * wide_item && layout->channels <= PY_SSIZE_T_MAX / 2 / layout->plane;
}

/* Two linear predictors, of a symbol and of how far off that will be. What they see lies together: of each place the symbols of a group's channels, and
 * those symbols' distances from their channel's centre. There is a row of zero places above and below a plane and one zero place after each row, so that
 * what lies outside the plane is one of those; `stride` is a row with its zero. A channel's weights for those of channels not before it are zero. */
typedef struct {
    int16_t here[GROUP], right[GROUP], below[GROUP], left[GROUP], above[GROUP]; /* of other channels' symbols */
    int16_t spread[GROUP];                                                    /* of their distances here */
    int16_t own_left, own_above, own_spread_left, own_spread_above;
} Weights;

typedef struct {
    const Weights *weights;
    const int32_t *mean_rows, *mean_columns, *spread_rows, *spread_columns;
    const uint8_t *centres;
    int16_t *values, *distances; /* of a group's places, then of the next's */
    int16_t *own, *own_distances; /* of one channel's places, for these are read one by one as they come */
    Py_ssize_t height, width, stride, places, first;
} Predictors;

/* Unsigned, since sums of weights and biases that context.py would refuse may wrap. */
static inline Py_ssize_t step(uint32_t sum, Py_ssize_t count)
{
    const int32_t score = (int32_t)sum;
    if (score < 0)
        return 0;
    return score >> SHIFT < count ? score >> SHIFT : count - 1;
}

/* Checks sizes and makes the places, all zero; leaves `it`, all zero, as it is where there is one context. Sets an exception where it returns 0. */
static int open_predictors(Predictors *it, const Py_buffer *weights, const Py_buffer *biases, const Py_buffer *centres, const Layout *layout)
{
    if (layout->contexts == 1)
        return 1;
    const Py_ssize_t channels = layout->channels, width = layout->width, height = layout->plane / width;
    if (weights->len / (Py_ssize_t)sizeof(Weights) != channels || weights->len % (Py_ssize_t)sizeof(Weights) ||
        biases->len / 8 != channels * (height + width) || biases->len % 8 || centres->len != channels) {
        PyErr_SetString(PyExc_ValueError, "predictors and symbols do not fit");
        return 0;
    }
    it->weights = weights->buf;
    it->mean_rows = biases->buf;
    it->mean_columns = it->mean_rows + channels * height;
    it->spread_rows = it->mean_columns + channels * width;
    it->spread_columns = it->spread_rows + channels * height;
    it->centres = centres->buf;
    it->height = height, it->width = width, it->stride = width + 1, it->first = it->stride + 1;
    it->places = (height + 2) * it->stride + 1;
    const Py_ssize_t lanes = ((channels - 1) / GROUP + 1) * GROUP;
    it->values = PyMem_Calloc((size_t)(2 * it->places), (size_t)(lanes + 1) * sizeof(int16_t));
    if (!it->values) {
        PyErr_NoMemory();
        return 0;
    }
    it->distances = it->values + lanes * it->places;
    it->own = it->distances + lanes * it->places;
    it->own_distances = it->own + it->places;
    return 1;
}

static inline void enter(Predictors *it, Py_ssize_t channel, Py_ssize_t place, uint8_t symbol)
{
    const int away = (int)symbol - it->centres[channel];
    it->own[it->first + place] = symbol;
    it->own_distances[it->first + place] = (int16_t)(away < 0 ? -away : away);
}

static void enter_all(Predictors *it, Py_ssize_t channel, const uint8_t *symbols)
{
    for (Py_ssize_t row = 0; row < it->height; row++)
        for (Py_ssize_t column = 0; column < it->width; column++)
            enter(it, channel, row * it->stride + column, *symbols++);
}

/* Shows a channel's symbols, all entered, to the channels after it. */
static void publish(Predictors *it, Py_ssize_t channel)
{
    int16_t *value = it->values + channel / GROUP * it->places * GROUP + channel % GROUP;
    int16_t *distance = it->distances + channel / GROUP * it->places * GROUP + channel % GROUP;
    for (Py_ssize_t place = 0; place < it->places; place++) {
        value[place * GROUP] = it->own[place];
        distance[place * GROUP] = it->own_distances[place];
    }
}

static inline uint32_t dot(const int16_t *weights, const int16_t *values)
{
    int32_t sum = 0;
    for (int lane = 0; lane < GROUP; lane++)
        sum += (int32_t)weights[lane] * values[lane];
    return (uint32_t)sum;
}

/* Which of its tables codes the symbol of `channel` at `row` and `column`; those to the left of it and above it are entered, channels before it published. */
static inline Py_ssize_t context(const Predictors *it, Py_ssize_t channel, Py_ssize_t row, Py_ssize_t column)
{
    const Weights *weights = it->weights + channel;
    const Py_ssize_t place = it->first + row * it->stride + column, group = channel / GROUP * it->places;
    const int16_t *values = it->values + (group + place) * GROUP, *distances = it->distances + (group + place) * GROUP;
    const int16_t *own = it->own + place, *away = it->own_distances + place;
    const Py_ssize_t below = it->stride * GROUP, above = -it->stride;
    const uint32_t mean = (uint32_t)it->mean_rows[channel * it->height + row] + (uint32_t)it->mean_columns[channel * it->width + column] +
                          dot(weights->here, values) + dot(weights->right, values + GROUP) + dot(weights->below, values + below) +
                          dot(weights->left, values - GROUP) + dot(weights->above, values - below) + (uint32_t)(weights->own_left * own[-1]) +
                          (uint32_t)(weights->own_above * own[above]);
    const uint32_t spread = (uint32_t)it->spread_rows[channel * it->height + row] + (uint32_t)it->spread_columns[channel * it->width + column] +
                            dot(weights->spread, distances) + (uint32_t)(weights->own_spread_left * away[-1]) +
                            (uint32_t)(weights->own_spread_above * away[above]);
    return step(mean, MEANS) * SPREADS + step(spread, SPREADS);
}

static PyObject *encode(PyObject *module, PyObject *args)
{
    Py_buffer symbols, freqs, starts, slots, weights, biases, centres;
    Layout layout;
    Predictors predictors = {0};
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*nninn", &symbols, &freqs, &starts, &slots, &weights, &biases, &centres, &layout.plane, &layout.levels,
                          &layout.precision, &layout.width, &layout.contexts))
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
    if (!open_predictors(&predictors, &weights, &biases, &centres, &layout))
        goto done;
    const int alone = layout.contexts == 1;
    for (Py_ssize_t channel = 0; !alone && channel < layout.channels; channel++) {
        enter_all(&predictors, channel, symbol + channel * layout.plane);
        publish(&predictors, channel);
    }
    uint8_t *out = buffer + capacity;
    const int precision = layout.precision;
    const uint32_t mask = ((uint32_t)1 << precision) - 1;
    const uint64_t unit = 256 * LOWER >> precision;
    uint64_t state = 0;
    for (Py_ssize_t channel = layout.channels; channel-- > 0;) {
        if (!alone) /* again, since there is room for the places of one channel only */
            enter_all(&predictors, channel, symbol + channel * layout.plane);
        for (Py_ssize_t index = layout.plane, line = layout.plane / layout.width, column = 0; index-- > 0;) {
            if (!column)
                column = layout.width, line--;
            column--;
            const uint8_t *here = symbol + channel * layout.plane + index;
            const Py_ssize_t row = channel * layout.contexts + (alone ? 0 : context(&predictors, channel, line, column));
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
    PyMem_Free(predictors.values);
    PyBuffer_Release(&symbols);
    PyBuffer_Release(&freqs);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&slots);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&biases);
    PyBuffer_Release(&centres);
    return payload;
}

static PyObject *decode(PyObject *module, PyObject *args)
{
    Py_buffer payload, freqs, entries, weights, biases, centres;
    Layout layout;
    Predictors predictors = {0};
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*nninn", &payload, &freqs, &entries, &weights, &biases, &centres, &layout.plane, &layout.levels,
                          &layout.precision, &layout.width, &layout.contexts))
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
    if (!open_predictors(&predictors, &weights, &biases, &centres, &layout))
        goto done;
    const int alone = layout.contexts == 1;
    symbols = PyBytes_FromStringAndSize(NULL, layout.channels * layout.plane);
    if (!symbols)
        goto done;
    uint8_t *here = (uint8_t *)PyBytes_AsString(symbols);
    const int precision = layout.precision;
    const uint32_t mask = ((uint32_t)1 << precision) - 1;
    uint64_t state = 0;
    for (Py_ssize_t channel = 0; channel < layout.channels; channel++) {
        for (Py_ssize_t index = 0, line = 0, column = 0; index < layout.plane; index++, here++, column++) {
            if (column == layout.width)
                column = 0, line++;
            const Py_ssize_t row = channel * layout.contexts + (alone ? 0 : context(&predictors, channel, line, column));
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
            if (!alone)
                enter(&predictors, channel, line * predictors.stride + column, *here);
            state = (state >> precision) * freq[s] + (packed >> 8);
        }
        if (!alone)
            publish(&predictors, channel);
    }
    if (state || in < end) {
        PyErr_SetString(PyExc_ValueError, "bytes are left over");
        Py_DECREF(symbols);
        symbols = NULL;
    }
done:
    PyMem_Free(predictors.values);
    PyBuffer_Release(&payload);
    PyBuffer_Release(&freqs);
    PyBuffer_Release(&entries);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&biases);
    PyBuffer_Release(&centres);
    return symbols;
}

static PyMethodDef methods[] = {
    {"encode", encode, METH_VARARGS, "encode(symbols, freqs, starts, slots, weights, biases, centres, plane, levels, precision, width, contexts) -> bytes"},
    {"decode", decode, METH_VARARGS, "decode(payload, freqs, entries, weights, biases, centres, plane, levels, precision, width, contexts) -> bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rans", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rans(void)
{
    return PyModuleDef_Init(&module);
}
