"""The source, in C++, of the function that `model.compile_decoding()` compiles on a CPU: see compiled_decoding.py."""

from .native_code import VECTORS

# It is a string in a module, so that it travels with the code of a checkpoint.
SOURCE = (
    VECTORS
    + r"""
// One decoding step in float32 on a CPU: what `decoding_step` of decoding.py computes, as one function. It takes models
// of any shape, any number of sequences, and for each of them one new token or, of a prompt, several. Each new token of
// each sequence is one row. compiled_decoding.py compiles it, and has the counterparts of its structures.
//
// With a few rows, a product of matrices takes as long as reading the weights. A library reads them at a third of the
// speed of the caches, because its kernels are made for many rows. Here each weight is read in the order in which it
// lies in memory, for up to eight rows at a time. Many rows are all multiplied by one tile of quantized weights while
// it is in the first cache. Quantized weights become float32 on their way into a register, INT4 of many rows on its way
// into a tile. Keys and values stay in the first cache while all query heads of their group read them. Threads share
// the outputs of a product, and the sequences and heads of attention.

#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <omp.h>

constexpr int ROWS = WIDTH == 16 ? 8 : 6; // 8 rows of two vectors are 16 of 32 registers, 6 rows 12 of 16
constexpr int COLUMNS = 32;               // of a block of packed weights
constexpr int PARTS = 3;                  // projections of one input: at most query, key and value
// Packed float32 comes from memory: in order, with all columns of a block at once, or it takes longer than it saves.
constexpr int FLOAT32_ROWS = WIDTH == 16 ? 8 : 3;
// Of INT4, so many rows read each weight for themselves: one instruction of AVX512 looks it up, and several of others.
constexpr int INT4_ROWS = WIDTH == 16 ? ROWS : 3;
constexpr int TILE = 64;  // inputs of a tile of COLUMNS outputs, 8 KiB in float32
constexpr int PIECE = 32; // inputs of INT4 that become float32 at a time; they share their scales

// In INT8, a weight is an integer times the scale of its output. In INT4, it is a number from a table of 16 times the
// scale of its block, and two weights share a byte: the first has the upper four bits.
enum Format : int64_t { FLOAT32, INT8, INT4 };

// Projections of one input, of which each gives some of the outputs.
struct Linear {
    // As a model stores them: (outputs of the part, inputs). Packed, there is one part, (outputs / COLUMNS, inputs,
    // COLUMNS), and the outputs are filled up to a whole block. INT4 is never packed.
    const void *weights[PARTS];
    const float *scales[PARTS]; // INT8: (outputs,). INT4: (outputs, inputs / block). Null in float32
    const float *biases[PARTS]; // null: no bias
    int64_t ends[PARTS];        // the outputs up to the end of each part
    int64_t inputs, outputs, is_packed, format;
    int64_t block;      // of INT4: so many weights of one output share a scale, a multiple of 32
    const float *table; // of INT4: (16,)
};

struct Norm {
    const float *weight, *bias; // (size,); no bias: null
    int64_t size, kind;         // of kind: see below
    double eps;
};

enum Kind : int64_t { IDENTITY, LAYERNORM, RMSNORM };
enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, RELU2 };

struct Layer {
    Norm input_layernorm, q_norm, k_norm, post_attention_layernorm;
    Linear query_key_value, o_proj, gate_up, down_proj;
    double scaling;
    int64_t activation;
};

struct Model {
    const Layer *layers;
    const float *embedding; // (vocab_size, hidden_size)
    Norm norm;
    Linear head;
    int64_t num_layers, vocab_size, hidden_size, heads, kv_heads, head_dim, rotary_dim, intermediate_size;
};

struct Step {
    int64_t batch, tokens, length, capacity, threads; // tokens: new ones of each sequence. length: of the earlier ones
    const int64_t *token_ids;                         // (batch, tokens)
    const float *cos, *sin; // (tokens, rotary_dim) of each sequence; the first half of sin is negated
    int64_t rotary_stride;  // from one sequence to the next; 0 if all have the same
    const float *mask;      // (batch, capacity), added to scores; null if there is no padding
    float *cache;   // (layers, 2 * kv_heads, batch, capacity, head_dim), keys before values; the tokens' own are added
    float *logits;  // (batch, outputs of the head), after the last token of each sequence; null if nobody needs them
    float *scratch; // as many floats as `scratch_size` says
};

static int64_t padded(int64_t size) { return (size + COLUMNS - 1) / COLUMNS * COLUMNS; }

static Vector load(const int8_t *from) {
    // The generic vectors of a compiler would convert them one by one.
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    Vector numbers;
    for (int i = 0; i < WIDTH; i++) numbers[i] = from[i];
    return numbers;
#endif
}
static Vector activated(Vector x, int64_t activation) {
    const Vector zero{};
    switch (activation) {
    case SILU:
        return x / (exp_of(-x) + 1.0f);
    case GELU:
        for (int i = 0; i < WIDTH; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
        return x;
    case GELU_TANH: {
        const Vector inner = 0.79788456f * (x + 0.044715f * x * x * x);
        return x - x / (exp_of(2.0f * inner) + 1.0f); // 0.5 * (1 + tanh(y)) = 1 - 1 / (exp(2y) + 1)
    }
    case RELU:
        return x > 0.0f ? x : zero;
    default:
        x = x > 0.0f ? x : zero;
        return x * x;
    }
}

// A norm of one vector. `to` may be `from`.
static void normalize(const Norm &norm, const float *from, float *to) {
    const int64_t size = norm.size;
    if (norm.kind == IDENTITY) {
        if (to != from) std::memcpy(to, from, size * sizeof(float));
        return;
    }
    float mean = 0, squares = 0;
    if (norm.kind == LAYERNORM) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < size; i++) mean += from[i];
        mean /= size;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += (from[i] - mean) * (from[i] - mean);
    const float scale = 1 / std::sqrt(squares / size + (float)norm.eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        const float shift = norm.bias == nullptr ? 0 : norm.bias[i];
        to[i] = (from[i] - mean) * scale * norm.weight[i] + shift;
    }
}

// Where the outputs of a product go.
struct Place {
    float *to;
    int64_t stride; // from one row to the next
    bool adds;      // to what stands there
};

// Calls `compute` with the number of its next rows, as a constant, and the first of them, until there are none left.
template <int R, typename Compute> static void for_rows(int64_t row, int64_t rows, const Compute &compute) {
    for (; row + R <= rows; row += R) compute(std::integral_constant<int, R>(), row);
    if constexpr (R > 1) for_rows<(R > 4 ? R / 2 : R - 1)>(row, rows, compute);
}

struct Pair {
    Vector first, second;
};

struct FourBits {}; // the type of weights in INT4

// The weights of one output as a model stores them. `at` gives 2 * WIDTH of them from k on, in float32. The scale that
// all weights of an output of INT8 share is left to the sum.
template <typename Weight> struct Output {
    const Weight *weights;
    int64_t block; // all of them
    Output(const Linear &linear, int part, int64_t number)
        : weights((const Weight *)linear.weights[part] + number * linear.inputs), block(linear.inputs) {}
    void begin_block() {}
    Pair at(int64_t k) const { return {load(weights + k), load(weights + k + WIDTH)}; }
};

// INT4. The table is multiplied by the scale of each block, not each weight: so an entry is the dequantized weight, bit
// by bit, and one or two instructions look up a vector of them. The first vector of a pair has the weights in the upper
// bits of the bytes, which are those of even inputs; `evens_and_odds` puts the inputs into the same order.
template <> struct Output<FourBits> {
    const uint8_t *weights;
    const float *scales, *unscaled;
    int64_t block;
    Vector table[16 / WIDTH];
    Output(const Linear &linear, int part, int64_t number)
        : weights((const uint8_t *)linear.weights[part] + number * linear.inputs / 2),
          scales(linear.scales[part] + number * linear.inputs / linear.block), unscaled(linear.table),
          block(linear.block) {}
    void begin_block() {
        for (int i = 0; i < 16 / WIDTH; i++) table[i] = load(unscaled + i * WIDTH) * *scales;
        scales++;
    }
#if defined(__AVX512F__)
    Vector entries(__m512i numbers) const { // the instruction reads the lower four bits of a number alone
        return (Vector)_mm512_permutexvar_ps(numbers, (__m512)table[0]);
    }
    Pair at(int64_t k) const {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(weights + k / 2)));
        return {entries(_mm512_srli_epi32(bytes, 4)), entries(bytes)};
    }
#elif defined(__AVX2__)
    Vector entries(__m256i numbers) const { // the instruction reads three bits, and the fourth chooses the half
        return (Vector)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)table[0], numbers),
                                        _mm256_permutevar8x32_ps((__m256)table[1], numbers),
                                        (__m256)_mm256_slli_epi32(numbers, 28));
    }
    Pair at(int64_t k) const {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(weights + k / 2)));
        return {entries(_mm256_srli_epi32(bytes, 4)), entries(bytes)};
    }
#else
    Pair at(int64_t k) const {
        const float *entries = (const float *)table;
        Pair pair;
        for (int i = 0; i < WIDTH; i++) {
            const uint8_t byte = weights[k / 2 + i];
            pair.first[i] = entries[byte >> 4], pair.second[i] = entries[byte & 15];
        }
        return pair;
    }
#endif
};

static void evens_and_odds(const float *from, float *to, int64_t size) {
    for (int64_t k = 0; k < size; k += 2 * WIDTH)
        for (int64_t i = 0; i < WIDTH; i++) to[k + i] = from[k + 2 * i], to[k + WIDTH + i] = from[k + 2 * i + 1];
}

// R rows of a product, for one output of weights as a model stores them.
template <typename Weight, int R>
static void output_of_product(const Linear &linear, int64_t number, const float *from, int64_t stride, Place place) {
    int part = 0;
    while (number >= linear.ends[part]) part++;
    const int64_t in_part = number - (part == 0 ? 0 : linear.ends[part - 1]);
    Output<Weight> output(linear, part, in_part);
    Vector even[R]{}, odd[R]{}; // two sums, because an addition has to wait for the one before it
    int64_t k = 0;
    for (int64_t end = output.block; end <= linear.inputs; end += output.block) {
        output.begin_block();
        for (; k + 2 * WIDTH <= end; k += 2 * WIDTH) {
            // With many rows, the processor is too busy to look ahead by itself.
            if (R > 2 && linear.format == FLOAT32)
                for (int i = 0; i < 2 * WIDTH; i += 16) __builtin_prefetch(output.weights + k + i + 512);
            const Pair weights = output.at(k);
            for (int row = 0; row < R; row++) {
                even[row] += load(from + row * stride + k) * weights.first;
                odd[row] += load(from + row * stride + k + WIDTH) * weights.second;
            }
        }
    }
    const float scale = linear.format == INT8 ? linear.scales[part][in_part] : 1;
    const float bias = linear.biases[part] == nullptr ? 0 : linear.biases[part][in_part];
    for (int row = 0; row < R; row++) {
        float sum = sum_of(even[row] + odd[row]);
        if constexpr (!std::is_same<Weight, FourBits>::value) // of which a block has no rest
            for (int64_t i = k; i < linear.inputs; i++) sum += from[row * stride + i] * output.weights[i];
        float *to = place.to + row * place.stride + number;
        *to = sum * scale + bias + (place.adds ? *to : 0);
    }
}

// What belongs to each of COLUMNS outputs. Those behind the last output are like it.
struct Columns {
    float scales[COLUMNS], biases[COLUMNS];
    const uint8_t *weights[COLUMNS];    // of INT4, from the first input on
    const float *block_scales[COLUMNS]; // of INT4
    Columns(const Linear &linear, int64_t first) {
        if (linear.format != INT4) { // packed
            for (int i = 0; i < COLUMNS; i++) {
                scales[i] = linear.scales[0] == nullptr ? 1 : linear.scales[0][first + i];
                biases[i] = linear.biases[0] == nullptr ? 0 : linear.biases[0][first + i];
            }
            return;
        }
        const int64_t blocks = linear.inputs / linear.block;
        int part = 0;
        for (int i = 0; i < COLUMNS; i++) {
            const int64_t number = std::min(first + i, linear.outputs - 1);
            while (number >= linear.ends[part]) part++;
            const int64_t in_part = number - (part == 0 ? 0 : linear.ends[part - 1]);
            scales[i] = 1;
            biases[i] = linear.biases[part] == nullptr ? 0 : linear.biases[part][in_part];
            weights[i] = (const uint8_t *)linear.weights[part] + in_part * linear.inputs / 2;
            block_scales[i] = linear.scales[part] + in_part * blocks;
        }
    }
};

#if defined(__AVX2__)
// Looks up 32 numbers of four bits at once, one byte of the entries after the other.
struct Lookup {
    __m256i bytes[4];
    Lookup() = default;
    explicit Lookup(const float *table) {
        uint8_t of_entries[32];
        for (int byte = 0; byte < 4; byte++) {
            for (int i = 0; i < 32; i++) of_entries[i] = ((const uint8_t *)(table + i % 16))[byte];
            bytes[byte] = _mm256_loadu_si256((const __m256i *)of_entries);
        }
    }
    // Writes COLUMNS entries. A vector of them has those of four numbers from each half.
    void entries(__m256i numbers, const float *scales, float *to) const {
        __m256i found[4];
        for (int byte = 0; byte < 4; byte++) found[byte] = _mm256_shuffle_epi8(bytes[byte], numbers);
        const __m256i lower[2] = {_mm256_unpacklo_epi8(found[0], found[1]), _mm256_unpackhi_epi8(found[0], found[1])};
        const __m256i upper[2] = {_mm256_unpacklo_epi8(found[2], found[3]), _mm256_unpackhi_epi8(found[2], found[3])};
        for (int i = 0; i < 2; i++) {
            const __m256 first = (__m256)_mm256_unpacklo_epi16(lower[i], upper[i]);
            const __m256 second = (__m256)_mm256_unpackhi_epi16(lower[i], upper[i]);
            _mm256_storeu_ps(to + 16 * i, first * _mm256_loadu_ps(scales + 16 * i));
            _mm256_storeu_ps(to + 16 * i + 8, second * _mm256_loadu_ps(scales + 16 * i + 8));
        }
    }
};

// Input k and the next ones of INT4 to a piece (PIECE, COLUMNS) of a tile.
static void dequantize(const Lookup &lookup, const Columns &columns, int64_t k, int64_t block, float *to) {
    float scales[COLUMNS];
    for (int i = 0; i < COLUMNS; i++) scales[i] = columns.block_scales[i][k / block];
    // 16 bytes of 16 outputs in each half, in the order that `entries` needs.
    __m256i bytes[16], shuffled[16];
    for (int i = 0; i < 16; i++) {
        const int output = i / 4 * 8 + i % 4;
        bytes[i] = _mm256_loadu2_m128i((const __m128i *)(columns.weights[output + 4] + k / 2),
                                       (const __m128i *)(columns.weights[output] + k / 2));
    }
    // Transposes each half: 16 * output + byte is the place of a byte, and each pass rotates this number by one bit.
    for (int pass = 0; pass < 4; pass++) {
        for (int i = 0; i < 8; i++) {
            shuffled[2 * i] = _mm256_unpacklo_epi8(bytes[i], bytes[i + 8]);
            shuffled[2 * i + 1] = _mm256_unpackhi_epi8(bytes[i], bytes[i + 8]);
        }
        std::memcpy(bytes, shuffled, sizeof(bytes));
    }
    const __m256i four_bits = _mm256_set1_epi8(15);
    for (int i = 0; i < 16; i++) {
        const __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), four_bits);
        lookup.entries(first, scales, to + 2 * i * COLUMNS);
        lookup.entries(_mm256_and_si256(bytes[i], four_bits), scales, to + (2 * i + 1) * COLUMNS);
    }
}
#else
typedef const float *Lookup;
static void dequantize(Lookup table, const Columns &columns, int64_t k, int64_t block, float *to) {
    for (int i = 0; i < COLUMNS; i++)
        for (int j = 0; j < PIECE; j += 2) {
            const uint8_t byte = columns.weights[i][(k + j) / 2];
            const float scale = columns.block_scales[i][k / block];
            to[j * COLUMNS + i] = table[byte >> 4] * scale;
            to[(j + 1) * COLUMNS + i] = table[byte & 15] * scale;
        }
}
#endif

// Adds the product of R rows and a tile to sums (R, COLUMNS).
template <typename Weight, int R>
static void product_of_tile(const Weight *tile, int64_t inputs, const float *from, int64_t stride, float *to) {
    constexpr int VECTORS = std::min(COLUMNS / WIDTH, R > 3 ? 2 : 4); // as many sums as fit into registers
    for (int column = 0; column < COLUMNS; column += VECTORS * WIDTH) {
        Vector sums[R][VECTORS];
        for (int row = 0; row < R; row++)
            for (int i = 0; i < VECTORS; i++) sums[row][i] = load(to + row * COLUMNS + column + i * WIDTH);
        for (int64_t k = 0; k < inputs; k++) {
            Vector weights[VECTORS];
            for (int i = 0; i < VECTORS; i++) weights[i] = load(tile + k * COLUMNS + column + i * WIDTH);
            for (int row = 0; row < R; row++)
                for (int i = 0; i < VECTORS; i++) sums[row][i] += from[row * stride + k] * weights[i];
        }
        for (int row = 0; row < R; row++)
            for (int i = 0; i < VECTORS; i++) store(to + row * COLUMNS + column + i * WIDTH, sums[row][i]);
    }
}

// A product with packed weights, or with INT4. `sums` has space for (rows, COLUMNS).
static void product_by_tiles(const Linear &linear, const float *from, int64_t stride, int64_t rows, Place place,
                             float *sums) {
    const Lookup lookup = linear.format == INT4 ? Lookup(linear.table) : Lookup();
    alignas(64) float dequantized[TILE * COLUMNS];
    // Few rows are computed in one go, for which nothing has to stay in the cache.
    const bool is_whole = linear.format == FLOAT32 || (linear.format == INT8 && rows <= ROWS);
    const int64_t length = is_whole ? linear.inputs : TILE;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < linear.outputs; first += COLUMNS) {
        const Columns columns(linear, first);
        std::memset(sums, 0, rows * COLUMNS * sizeof(float));
        for (int64_t k = 0; k < linear.inputs; k += length) {
            const int64_t inputs = std::min(length, linear.inputs - k);
            const auto multiply = [&](auto most, const auto *tile) {
                for_rows<decltype(most)::value>(0, rows, [&](auto count, int64_t row) {
                    product_of_tile<std::decay_t<decltype(*tile)>, decltype(count)::value>(
                        tile, inputs, from + row * stride + k, stride, sums + row * COLUMNS);
                });
            };
            const int64_t packed = first * linear.inputs + k * COLUMNS; // where the tile begins
            if (linear.format == INT4) {
                for (int64_t i = 0; i < inputs; i += PIECE)
                    dequantize(lookup, columns, k + i, linear.block, dequantized + i * COLUMNS);
                multiply(std::integral_constant<int, ROWS>(), (const float *)dequantized);
            } else if (linear.format == INT8)
                multiply(std::integral_constant<int, ROWS>(), (const int8_t *)linear.weights[0] + packed);
            else
                multiply(std::integral_constant<int, FLOAT32_ROWS>(), (const float *)linear.weights[0] + packed);
        }
        const int64_t outputs = std::min<int64_t>(COLUMNS, linear.outputs - first);
        for (int64_t row = 0; row < rows; row++) {
            const float *sum = sums + row * COLUMNS;
            float *to = place.to + row * place.stride + first;
            for (int64_t i = 0; i < outputs; i++)
                to[i] = sum[i] * columns.scales[i] + columns.biases[i] + (place.adds ? to[i] : 0);
        }
    }
}

template <typename Weight>
static void product_of(const Linear &linear, const float *from, int64_t stride, int64_t rows, Place place) {
#pragma omp for schedule(static)
    for (int64_t output = 0; output < linear.outputs; output++)
        for_rows<ROWS>(0, rows, [&](auto count, int64_t row) {
            const Place there{place.to + row * place.stride, place.stride, place.adds};
            output_of_product<Weight, decltype(count)::value>(linear, output, from + row * stride, stride, there);
        });
}

// Rows (rows, inputs) times the weights. All threads call it, each with a `copy` of its own for (rows, inputs).
static void product(const Linear &linear, const float *from, int64_t stride, int64_t rows, Place place, float *copy) {
    const int64_t inputs = linear.inputs;
    if (linear.is_packed || (linear.format == INT4 && rows > INT4_ROWS))
        product_by_tiles(linear, from, stride, rows, place, copy);
    else if (linear.format == INT4) {
        for (int64_t row = 0; row < rows; row++) evens_and_odds(from + row * stride, copy + row * inputs, inputs);
        product_of<FourBits>(linear, copy, inputs, rows, place);
    } else if (linear.format == INT8)
        product_of<int8_t>(linear, from, stride, rows, place);
    else
        product_of<float>(linear, from, stride, rows, place);
}

// The rotary embedding of one head.
static void rotate(float *states, const float *cos, const float *sin, int64_t rotary_dim) {
    const int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = states[i], second = states[half + i];
        states[i] = first * cos[i] + second * sin[i];
        states[half + i] = second * cos[half + i] + first * sin[half + i];
    }
}

// The product of a query with each key. N: how many vectors a head is; 0 if it is no whole number of them.
template <int N>
static void scores_of(const float *query, const float *keys, float *scores, int64_t length, int64_t dim) {
    if constexpr (N == 0) {
        for (int64_t token = 0; token < length; token++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < dim; i++) sum += query[i] * keys[token * dim + i];
            scores[token] = sum;
        }
    } else {
        Vector parts[N];
        for (int i = 0; i < N; i++) parts[i] = load(query + i * WIDTH);
        for (int64_t token = 0; token < length; token++) {
            Vector sum = parts[0] * load(keys + token * dim);
            for (int i = 1; i < N; i++) sum += parts[i] * load(keys + token * dim + i * WIDTH);
            scores[token] = sum_of(sum);
        }
    }
}

// The sum of the values, each with its weight, times `scale`.
template <int N>
static void weighted_sum(const float *weights, const float *values, float scale, float *to, int64_t length,
                         int64_t dim) {
    if constexpr (N == 0) {
        for (int64_t i = 0; i < dim; i++) to[i] = 0;
        for (int64_t token = 0; token < length; token++)
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) to[i] += scale * weights[token] * values[token * dim + i];
    } else {
        Vector even[N]{}, odd[N]{}; // two sums, because an addition has to wait for the one before it
        int64_t token = 0;
        for (; token + 1 < length; token += 2)
            for (int i = 0; i < N; i++) {
                even[i] += weights[token] * load(values + token * dim + i * WIDTH);
                odd[i] += weights[token + 1] * load(values + (token + 1) * dim + i * WIDTH);
            }
        if (token < length)
            for (int i = 0; i < N; i++) even[i] += weights[token] * load(values + token * dim + i * WIDTH);
        for (int i = 0; i < N; i++) store(to + i * WIDTH, scale * (even[i] + odd[i]));
    }
}

// Scores to weights that are not yet divided by their sum, which it returns. It writes up to WIDTH - 1 floats more.
static float softmax(float *scores, int64_t length) {
    float highest = scores[0];
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < length; i++) highest = scores[i] > highest ? scores[i] : highest;
    if (highest == -INFINITY) { // padding, for which nothing is visible
        std::memset(scores, 0, length * sizeof(float));
        return 1;
    }
    for (int64_t i = 0; i < length; i += WIDTH) store(scores + i, exp_of(load(scores + i) - highest));
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < length; i++) sum += scores[i];
    return sum;
}

// Attention of all query heads of one key/value head, for one new token. Its own key and value go into the cache.
template <int N>
static void attention_of_group(const Model &model, const Layer &layer, const Step &step, float *cache, int64_t head,
                               int64_t sequence, int64_t token, float *states, float *to, float *scores) {
    const int64_t dim = model.head_dim, group = model.heads / model.kv_heads, place = step.length + token;
    const int64_t rotary = sequence * step.rotary_stride + token * model.rotary_dim, length = place + 1;
    const float *cos = step.cos + rotary, *sin = step.sin + rotary;
    float *query = states + head * group * dim, *key = states + (model.heads + head) * dim;
    const float *value = key + model.kv_heads * dim;
    float *keys = cache + (head * step.batch + sequence) * step.capacity * dim;
    float *values = keys + model.kv_heads * step.batch * step.capacity * dim;

    normalize(layer.k_norm, key, key);
    rotate(key, cos, sin, model.rotary_dim);
    std::memcpy(keys + place * dim, key, dim * sizeof(float));
    std::memcpy(values + place * dim, value, dim * sizeof(float));
    for (int64_t i = 0; i < group; i++, query += dim) {
        normalize(layer.q_norm, query, query);
        rotate(query, cos, sin, model.rotary_dim);
        for (int64_t j = 0; j < dim; j++) query[j] *= (float)layer.scaling;
        scores_of<N>(query, keys, scores, length, dim);
        if (step.mask != nullptr) {
            const float *mask = step.mask + sequence * step.capacity;
            for (int64_t j = 0; j < length; j++) scores[j] += mask[j];
        }
        const float sum = softmax(scores, length);
        weighted_sum<N>(scores, values, 1 / sum, to + (head * group + i) * dim, length, dim);
    }
}

struct Sizes { // of a row of each intermediate result
    int64_t hidden, states, attention, gate_up, activated, widest, scores;
    explicit Sizes(const Model &model, const Step &step) {
        hidden = padded(model.hidden_size);
        states = padded((model.heads + 2 * model.kv_heads) * model.head_dim);
        attention = padded(model.heads * model.head_dim);
        gate_up = padded(2 * model.intermediate_size);
        activated = padded(model.intermediate_size);
        widest = std::max({hidden, attention, activated}); // of those that are multiplied
        scores = padded(step.capacity + 1);
    }
};

extern "C" void structure_sizes(int64_t *sizes) {
    const int64_t all[] = {sizeof(Linear), sizeof(Norm), sizeof(Layer), sizeof(Model), sizeof(Step)};
    std::memcpy(sizes, all, sizeof(all));
}

extern "C" int64_t scratch_size(const Model &model, const Step &step) {
    const Sizes sizes(model, step);
    const int64_t of_row = 2 * sizes.hidden + sizes.states + sizes.attention + sizes.gate_up + sizes.activated;
    const int64_t rows = step.batch * step.tokens, of_thread = rows * sizes.widest + sizes.scores;
    return rows * of_row + step.threads * of_thread + COLUMNS; // vectors may read beyond the end
}

// Whether each token is in the vocabulary; if not, nothing is read or written.
extern "C" bool decoding_step(const Model &model, const Step &step) {
    const int64_t batch = step.batch, tokens = step.tokens, rows = batch * tokens;
    for (int64_t row = 0; row < rows; row++)
        if (step.token_ids[row] < 0 || step.token_ids[row] >= model.vocab_size) return false;
    const Sizes sizes(model, step);
    const int64_t dim = model.head_dim, intermediate = model.intermediate_size;
    float *hidden = step.scratch, *normed = hidden + rows * sizes.hidden, *states = normed + rows * sizes.hidden;
    float *attention = states + rows * sizes.states, *gate_up = attention + rows * sizes.attention;
    float *activations = gate_up + rows * sizes.gate_up, *of_threads = activations + rows * sizes.activated;
    const int64_t layer_of_cache = 2 * model.kv_heads * batch * step.capacity * dim;
    const int64_t vectors = dim % WIDTH == 0 ? dim / WIDTH : 0;
    const auto attend = vectors == 1   ? attention_of_group<1>
                        : vectors == 2 ? attention_of_group<2>
                        : vectors == 4 ? attention_of_group<4>
                        : vectors == 8 ? attention_of_group<8>
                                       : attention_of_group<0>;

    // Every loop with `omp for` is shared by the threads, and ends when all of them are done.
#pragma omp parallel num_threads((int)step.threads)
    {
        float *copy = of_threads + omp_get_thread_num() * (rows * sizes.widest + sizes.scores);
        float *scores = copy + rows * sizes.widest;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            std::memcpy(hidden + row * sizes.hidden, model.embedding + step.token_ids[row] * model.hidden_size,
                        model.hidden_size * sizeof(float));
        const auto normalize_all = [&](const Norm &norm) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++)
                normalize(norm, hidden + row * sizes.hidden, normed + row * sizes.hidden);
        };
        for (int64_t number = 0; number < model.num_layers; number++) {
            const Layer &layer = model.layers[number];
            normalize_all(layer.input_layernorm);
            product(layer.query_key_value, normed, sizes.hidden, rows, {states, sizes.states, false}, copy);
#pragma omp for schedule(static) collapse(2)
            for (int64_t head = 0; head < model.kv_heads; head++)
                for (int64_t sequence = 0; sequence < batch; sequence++)
                    for (int64_t token = 0; token < tokens; token++) { // in order: each reads the keys before it
                        const int64_t row = sequence * tokens + token;
                        attend(model, layer, step, step.cache + number * layer_of_cache, head, sequence, token,
                               states + row * sizes.states, attention + row * sizes.attention, scores);
                    }
            product(layer.o_proj, attention, sizes.attention, rows, {hidden, sizes.hidden, true}, copy);
            normalize_all(layer.post_attention_layernorm);
            product(layer.gate_up, normed, sizes.hidden, rows, {gate_up, sizes.gate_up, false}, copy);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) {
                const float *gate = gate_up + row * sizes.gate_up, *up = gate + intermediate;
                for (int64_t i = 0; i < intermediate; i += WIDTH)
                    store(activations + row * sizes.activated + i,
                          activated(load(gate + i), layer.activation) * load(up + i));
            }
            product(layer.down_proj, activations, sizes.activated, rows, {hidden, sizes.hidden, true}, copy);
        }
        if (step.logits != nullptr) {
            normalize_all(model.norm);
            const float *last = normed + (tokens - 1) * sizes.hidden; // token of the first sequence
            product(model.head, last, tokens * sizes.hidden, batch, {step.logits, model.head.outputs, false}, copy);
        }
    }
    return true;
}
"""
)
