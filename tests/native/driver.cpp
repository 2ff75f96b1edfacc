// Random programs through the kernels of the native library, against plain loops in float64: for sanitizers, without
// Python and without PyTorch. Built and run by tests/ops/test_ops_sanitizers.py:
//
//     driver FIRST_SEED NUM_SEEDS
//
// The last line tells how many cases passed; at the first failure, the exit status is 1 and a line names the case.
//
// Compiled with -DINSTRUCTION_SETS='SET(baseline) SET(avx2)' for the sets that are linked. Every buffer is as large as
// it must be and no larger, on the heap, so that a step beside it is seen.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../embtables/ops/csrc/program.h"

using namespace embtables;

namespace embtables {
#define SET(name) extern const Functions name##_functions;
INSTRUCTION_SETS
#undef SET
}  // namespace embtables

static std::vector<const Functions*> instruction_sets() {
    std::vector<const Functions*> sets;
#define SET(name) sets.push_back(&name##_functions);
    INSTRUCTION_SETS
#undef SET
    return sets;
}

// ---- failures --------------------------------------------------------------------------------------------------------

// What a caller tries; the library's threads have none, and tell of the last one that began.
thread_local std::string current_case;
static std::mutex beginning;
static std::string last_case = "before the first case";

static void begin(const std::string& name) {
    current_case = name;
    const std::lock_guard<std::mutex> lock(beginning);
    last_case = name;
}

static void print_case(const char* what) {
    std::fprintf(stderr, "driver: %s: %s\n", (current_case.empty() ? last_case : current_case).c_str(), what);
    std::fflush(stderr);
}

[[noreturn]] static void fail(const std::string& what) {
    print_case(what.c_str());
    std::_Exit(1);
}

#define EXPECT(condition, what) \
    do {                        \
        if (!(condition)) fail(what); \
    } while (0)

// Sanitizers call this when they end the process; without them, signals do.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*)());

static void name_failures() {
    if (__sanitizer_set_death_callback) return __sanitizer_set_death_callback([] { print_case("ended by a sanitizer"); });
    for (int number : {SIGSEGV, SIGABRT, SIGFPE}) std::signal(number, [](int signal) { fail("signal " + std::to_string(signal)); });
}

// ---- memory that runs out --------------------------------------------------------------------------------------------

// The allocation that fails, counted from now on; none where it is negative.
static std::atomic<int64_t> allocations_left{-1};

static void* allocate(std::size_t size) {
    if (allocations_left.load() >= 0 && allocations_left.fetch_sub(1) == 0) throw std::bad_alloc();
    void* memory = std::malloc(size ? size : 1);
    if (!memory) throw std::bad_alloc();
    return memory;
}
void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

// ---- numbers ---------------------------------------------------------------------------------------------------------

struct Random {
    std::mt19937_64 engine;
    int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool chance(int64_t one_in) { return below(one_in) == 0; }
    int64_t any() { return static_cast<int64_t>(engine()); }
    double uniform() { return static_cast<double>(engine() >> 11) * 0x1p-53; }
    template <class T>
    T one_of(std::initializer_list<T> list) { return list.begin()[below(static_cast<int64_t>(list.size()))]; }
};

static int64_t bytes_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Scalars of any of the types, read and written by what the formats are: sign, exponent, fraction.
static double decoded(const void* memory, int64_t at, int64_t dtype) {
    if (dtype == FLOAT32) {
        float value;
        std::memcpy(&value, static_cast<const char*>(memory) + 4 * at, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, static_cast<const char*>(memory) + 2 * at, 2);
    const int fraction_bits = dtype == BFLOAT16 ? 7 : 10, exponent_bits = 15 - fraction_bits;
    const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
    return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

// The value has to be exact in the type.
static void encode(void* memory, int64_t at, int64_t dtype, double value) {
    if (dtype == FLOAT32) {
        const float single = static_cast<float>(value);
        std::memcpy(static_cast<char*>(memory) + 4 * at, &single, 4);
        return;
    }
    const int fraction_bits = dtype == BFLOAT16 ? 7 : 10, bias = dtype == BFLOAT16 ? 127 : 15;
    int exponent = 0;
    const double mantissa = std::frexp(std::fabs(value), &exponent);
    uint16_t bits = 0;
    if (value != 0)
        bits = static_cast<uint16_t>(((exponent - 1 + bias) << fraction_bits) +
                                     static_cast<int>(std::ldexp(mantissa, fraction_bits + 1)) - (1 << fraction_bits));
    if (value < 0) bits |= 0x8000;
    std::memcpy(static_cast<char*>(memory) + 2 * at, &bits, 2);
    EXPECT(decoded(memory, at, dtype) == value, "the driver encodes a value that is not exact");
}

// Bytes on the heap, right up to the end of a block; they begin as the type must be aligned and no better.
class Memory {
public:
    Memory() = default;
    Memory(int64_t count, int64_t item, int64_t shift = 0) : item_(item), shift_(shift * item), size_(count * item) {
        block_.reset(new char[static_cast<std::size_t>(shift_ + size_)]);
        std::memset(block_.get(), 0x5a, static_cast<std::size_t>(shift_ + size_));
    }
    Memory(const Memory& other) : Memory(other.item_ ? other.size_ / other.item_ : 0, other.item_, other.item_ ? other.shift_ / other.item_ : 0) {
        if (size_) std::memcpy(data(), other.data(), static_cast<std::size_t>(size_));
    }
    Memory(Memory&&) = default;
    Memory& operator=(Memory&&) = default;
    Memory& operator=(const Memory& other) { return *this = Memory(other); }
    void* data() const { return size_ ? block_.get() + shift_ : nullptr; }
    template <class T>
    T* as() const { return static_cast<T*>(data()); }
    int64_t count() const { return item_ ? size_ / item_ : 0; }
    bool operator==(const Memory& other) const {
        return size_ == other.size_ && (size_ == 0 || std::memcmp(data(), other.data(), static_cast<std::size_t>(size_)) == 0);
    }

private:
    std::unique_ptr<char[]> block_;
    int64_t item_ = 0, shift_ = 0, size_ = 0;
};

// ---- addresses, as embtables/hashing.py and embtables/ops/program.py state them ---------------------------------------

static uint64_t splitmix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x ^= x >> 30, x *= 0xBF58476D1CE4E5B9u;
    x ^= x >> 27, x *= 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static int64_t hashed(int64_t id, int64_t seed, int64_t size) {
    const uint64_t upper = splitmix(static_cast<uint64_t>(id) ^ static_cast<uint64_t>(seed)) >> 2;
    if (size >= int64_t{1} << 32) return static_cast<int64_t>(upper % static_cast<uint64_t>(size));
    return static_cast<int64_t>((static_cast<unsigned __int128>(upper) * static_cast<uint64_t>(size)) >> 62);
}

static int64_t dealt(int64_t id, const Piece& piece, int64_t scalars) {  // to fewer than 2**31 rows
    const int64_t number = id / (piece.b / scalars), place = id % (piece.b / scalars);
    const uint64_t turned = static_cast<uint64_t>(piece.a) + static_cast<uint64_t>(number) * static_cast<uint64_t>(piece.turn);
    return (place * scalars + static_cast<int64_t>((turned >> 32) * static_cast<uint64_t>(piece.b) >> 32)) % piece.b;
}

static double sign_of(const Piece& piece, int64_t id) {
    if (!piece.has_sign) return 1;
    return (splitmix(static_cast<uint64_t>(id) ^ static_cast<uint64_t>(piece.sign_seed)) >> 62) & 1 ? 1 : -1;
}

// ---- a random case -----------------------------------------------------------------------------------------------------

struct Slab {
    int64_t weight, base, rows;
};

// A buffer of integers, as the kernels read them.
struct Integers {
    int64_t bytes, columns;
    std::vector<int64_t> values;
};

struct Case {
    Random random;
    std::vector<Lookup> lookups, rests;
    std::vector<Piece> pieces;
    std::vector<Projection> projections;
    std::vector<int64_t> widths, rows;  // of each weight
    std::vector<Integers> integers;
    std::vector<Output> outputs;
    int64_t num_features = 0, batch = 0, num_ids = 0, num_values = 0, num_rows = 0, rows_per_example = 0;
    int64_t dtype = 0, state_dtype = 0, rule = 0, step = 1;
    bool jagged = false, weighted = false, narrow_ids = false, has_blocks = false, keeps_rows = false;
    bool halves = false;  // whether weights are trained in bfloat16, by gradients in float32
    bool averaged = false;  // whether the rule keeps a running mean of the weights
    bool unordered = false;  // whether the rows of a sparse matrix do not rise: what is found then is anything that it has
    std::vector<double> hyper;
    std::vector<int64_t> ids, offsets;
    // What calls are given.
    Memory words, id_memory, offset_memory, id_weights, gradient;
    std::vector<Memory> codes, weights, projection_weights, states, projection_states, strengths;

    explicit Case(uint64_t seed) { random.engine.seed(seed * 2654435761u + 1); }
    void make();
    void make_single();
    void make_sparse();
    std::string name() const;
    int64_t weight_type() const { return halves ? static_cast<int64_t>(BFLOAT16) : dtype; }
    int64_t whole_rule() const { return rule | (averaged ? AVERAGED : 0); }

private:
    std::map<int64_t, std::vector<Slab>> slabs_;  // by width; those of blocks apart
    bool shares_ = true;                          // whether slabs may be others' too

    Slab slab(int64_t width, int64_t rows, bool may_share, bool of_blocks = false);
    int64_t projection(int64_t width, int64_t dim);
    int64_t code(int64_t columns, std::vector<int64_t> values, bool may_be_damaged = true);
    void add_piece(int64_t kind, const Slab& slab, int64_t a, int64_t b, int64_t width, int64_t column, bool sign);
    void make_lookup(Lookup& lookup);
    void make_pieces(Lookup& lookup, int64_t kind, int64_t known);
    void make_rest(Lookup& lookup, int64_t known);
    void project(Lookup& lookup);
    void make_matrix(const Lookup& lookup, int64_t known);
    void make_program();
    void write_program();
    void make_input();
    void make_values(int64_t last_rule);
    Memory scalars(int64_t count, int64_t type, double low, double high);
};

std::string Case::name() const {
    static const char* rules[] = {"sgd", "rowwise adagrad", "adagrad", "adam", "dense gradients", "sparse gradients"};
    static const char* types[] = {"float32", "bfloat16", "float16"};
    return std::string(jagged ? "jagged" : "dense") + (weighted ? ", weighted" : "") + (narrow_ids ? ", int32" : ", int64") + ", " + types[dtype] +
           " with state of " + types[state_dtype] + (halves ? ", weights in bfloat16" : "") + (averaged ? ", averaged " : ", ") + rules[rule] + ", batch " + std::to_string(batch);
}

// Rows of a weight of this width: new ones, or those of a slab that is as large.
Slab Case::slab(int64_t width, int64_t rows_needed, bool may_share, bool of_blocks) {
    std::vector<Slab>& known = slabs_[of_blocks ? 0 : width];
    if (may_share && shares_)
        for (const Slab& other : known)
            if (other.rows >= rows_needed && random.chance(2)) return other;
    int64_t w = 0;
    while (w < static_cast<int64_t>(widths.size()) && widths[w] != width) ++w;
    if (w == static_cast<int64_t>(widths.size())) widths.push_back(width), rows.push_back(0);
    if (of_blocks)  // regions, which threads share out, end within it, or near its ends
        rows[w] += random.chance(3) ? 0 : (2 * 1024 - rows[w] % 1024 - random.below(std::min<int64_t>(rows_needed, 20))) % 1024;
    else if (random.chance(3))
        rows[w] += random.between(1, 40);  // rows of nobody
    const Slab made{w, rows[w], rows_needed};
    rows[w] += rows_needed;
    known.push_back(made);
    return made;
}

void Case::add_piece(int64_t kind, const Slab& slab, int64_t a, int64_t b, int64_t width, int64_t column, bool sign) {
    pieces.push_back({kind, slab.weight, slab.base, a, b, width, column, sign, sign ? random.any() : 0, -1, -1, -1, slab.base,
                      slab.rows, slab.base, 0, kind == BALANCED || kind == BALANCED_BLOCK ? random.any() : 0});
}

// One of this shape, which lookups may share.
int64_t Case::projection(int64_t width, int64_t dim) {
    int64_t p = 0;
    while (p < static_cast<int64_t>(projections.size()) && (projections[p].width != width || projections[p].dim != dim)) ++p;
    if (p == static_cast<int64_t>(projections.size())) projections.push_back({width, dim, random.chance(2)});
    return p;
}

// Of any type that holds them; now and then some are damaged.
int64_t Case::code(int64_t columns, std::vector<int64_t> values, bool may_be_damaged) {
    const int64_t most = values.empty() ? 0 : *std::max_element(values.begin(), values.end());
    int64_t bytes = random.one_of<int64_t>({1, 2, 4, 8});
    if (bytes == 1 && most > UINT8_MAX) bytes = 2;
    if (bytes == 2 && most > INT16_MAX) bytes = 4;
    if (may_be_damaged && random.chance(3))
        for (int64_t n = static_cast<int64_t>(values.size()) / 8; n >= 0 && !values.empty(); --n) {
            const int64_t wrong = random.one_of<int64_t>({random.any(), most + 1, -1, INT64_MIN, INT64_MAX, INT32_MIN, 255, 300});
            int64_t& value = values[random.below(static_cast<int64_t>(values.size()))];
            value = bytes == 1 ? static_cast<uint8_t>(wrong) : bytes == 2 ? static_cast<int16_t>(wrong) : bytes == 4 ? static_cast<int32_t>(wrong) : wrong;
        }
    integers.push_back({bytes, columns, std::move(values)});
    return static_cast<int64_t>(integers.size()) - 1;
}

// Those with code of their own, and those between them.
static int64_t any_width(Random& random) {
    return random.one_of<int64_t>({1, 2, 4, 8, 16, 32, 64, 128, random.between(3, 7), random.between(9, 15), random.between(9, 15),
                                   random.between(17, 31), random.between(33, 70), random.between(1, 140)});
}

void Case::make_lookup(Lookup& lookup) {
    lookup.column = random.below(num_features);
    lookup.dim = lookup.inner = any_width(random);
    lookup.fold_seed = random.any();
    lookup.first_piece = static_cast<int64_t>(pieces.size());
    lookup.code = lookup.projection = lookup.inner_projection = lookup.rest = -1;
    const int64_t kind = random.below(13);
    // Hashes and digits take any number of ids; the others have a row for each.
    const bool hashes = kind >= 5 && kind <= 8;
    lookup.size = hashes ? random.one_of<int64_t>({1, 7, 1000, int64_t{1} << 31, int64_t{1} << 40, int64_t{1} << 61}) : random.between(1, 300);
    lookup.policy = random.one_of<int64_t>({REFUSE, FOLD, OOV});
    if (hashes && kind >= 6 && random.chance(3)) lookup.policy = ANY, lookup.size = int64_t{1} << 62;
    const int64_t known = lookup.size + (lookup.policy == OOV);
    lookup.has_padding = random.chance(2);
    lookup.padding = lookup.has_padding ? (lookup.policy == ANY ? random.between(-3, 3) : random.below(std::min<int64_t>(lookup.size, 4))) : -1;
    const bool ranked = (kind == 1 || kind == 2 || kind >= 9) && random.chance(2);
    if (ranked) {
        lookup.ranks_from = random.below(5);
        std::vector<int64_t> ranks(static_cast<std::size_t>(lookup.ranks_from + known), 0);
        for (int64_t i = 0; i < known; ++i) ranks[lookup.ranks_from + i] = i;
        std::shuffle(ranks.begin() + lookup.ranks_from, ranks.end(), random.engine);
        lookup.code = code(1, ranks);
    }
    // Those behind are the rest's.
    const int64_t held = kind == 2 && known > 1 && !random.chance(3) ? random.between(1, known - 1) : known;
    make_pieces(lookup, kind, held);
    if (random.chance(12)) {  // nothing: zeros
        pieces.resize(lookup.first_piece);
        lookup.num_pieces = lookup.num_rows = 0, lookup.operation = SUM, lookup.code = -1;
    } else if (held < known) {
        make_rest(lookup, known - held);
    }
    if (kind != 2 && kind != 8 && random.chance(3)) {
        lookup.dim = any_width(random);
        project(lookup);
    } else if (lookup.operation == CONCAT && lookup.num_pieces > 0 && random.chance(3)) {
        lookup.dim += random.between(1, 20);  // zeros
    }
}

// One projection behind the combination, or two.
void Case::project(Lookup& lookup) {
    if (random.chance(2)) {
        lookup.middle = any_width(random);
        lookup.inner_projection = projection(lookup.inner, lookup.middle);
    }
    lookup.projection = projection(lookup.inner_projection < 0 ? lookup.inner : lookup.middle, lookup.dim);
}

// What the ids behind the alternatives are looked up by: it reads no slab of theirs.
void Case::make_rest(Lookup& lookup, int64_t known) {
    Lookup rest = lookup;
    rest.code = -1;
    rest.first_piece = static_cast<int64_t>(pieces.size());
    const int64_t kind = random.one_of<int64_t>({0, 1, 3, 4, 6, 6, 7, 8, 8, 9, 10});
    if (kind != 8 && random.chance(3)) {
        rest.inner = any_width(random);
        project(rest);
    } else if ((kind <= 1 || kind == 6 || kind == 8) && rest.dim > 1 && random.chance(3)) {
        rest.inner = random.between(1, rest.dim - 1);  // and zeros
    }
    shares_ = false;
    make_pieces(rest, kind, known);
    shares_ = true;
    if (random.chance(8)) {
        pieces.resize(rest.first_piece);
        rest.num_pieces = rest.num_rows = 0, rest.operation = SUM, rest.projection = rest.inner_projection = -1, rest.inner = rest.dim;
    }
    lookup.num_rows = std::max<int64_t>(1, rest.num_rows);
    lookup.rest = static_cast<int64_t>(lookups.size() + rests.size());
    rests.push_back(rest);
}

void Case::make_pieces(Lookup& lookup, int64_t kind, int64_t known) {
    const int64_t dim = lookup.inner;
    // Balanced addresses take what has a vocabulary.
    const bool balances = lookup.policy != ANY && random.chance(2);
    const int64_t hash = balances ? BALANCED : HASH;
    lookup.operation = CONCAT;
    switch (kind) {
        case 0:  // a row an id
            add_piece(ROW, slab(dim, known, true), 0, 0, dim, 0, false);
            break;
        case 1: {  // the last row is shared by all from there on
            const int64_t greatest = random.below(known);
            add_piece(CUT, slab(dim, greatest + 1, false), greatest, 0, dim, 0, false);
            break;
        }
        case 2: {  // the wider, the more frequent
            lookup.operation = MIXED;
            int64_t end = 0, width = dim;
            while (end < known) {
                const int64_t from = end;
                end = width == 1 || random.chance(4) ? known : std::min(known, end + random.between(1, 100));
                add_piece(ROW, slab(width, end - from, false), end, 0, width, 0, false);
                pieces.back().base -= from;
                if (width < dim) pieces.back().projection = projection(width, dim);
                width = random.between(1, width - 1 > 1 ? width - 1 : 1);
            }
            break;
        }
        case 3:  // digits with as many places as ids need
        case 4: {
            lookup.operation = random.one_of<int64_t>({SUM, MULT, CONCAT});
            const int64_t count = lookup.operation == CONCAT ? std::min<int64_t>(dim, 2) : random.between(2, 4);
            int64_t divisor = 1, column = 0;
            for (int64_t c = 0; c < count; ++c) {
                const int64_t radix = random.between(2, 20), width = lookup.operation != CONCAT ? dim : c + 1 < count ? (dim + 1) / 2 : dim - column;
                add_piece(DIGIT, slab(width, radix, false), divisor, radix, width, column, false);
                divisor *= radix;
                if (lookup.operation == CONCAT) column += width;
            }
            break;
        }
        case 5: {  // digits of long ids
            lookup.operation = MULT;
            const int64_t radix = random.between(2, 30);
            add_piece(DIGIT, slab(dim, radix, false), 1, radix, dim, 0, false);
            add_piece(DIGIT, slab(dim, 50, false), (int64_t{1} << 33) + 1, 50, dim, 0, false);
            break;
        }
        case 6: {  // hashes, side by side or one
            int64_t column = 0;
            while (column < dim) {
                const int64_t width = random.chance(2) ? dim - column : random.between(1, dim - column), size = random.between(1, 200);
                add_piece(hash, slab(width, size, true), random.any(), size, width, column, false);
                column += width;
            }
            break;
        }
        case 7: {
            lookup.operation = random.one_of<int64_t>({SUM, MEAN});
            const bool signs = random.chance(2);
            const int64_t count = random.between(1, 4), size = random.between(1, 200);
            const Slab rows_of_all = slab(dim, size, true);
            for (int64_t c = 0; c < count; ++c) add_piece(hash, rows_of_all, random.any(), size, dim, 0, signs);
            break;
        }
        case 9:
        case 10: {  // what codes say, beside hashes
            lookup.operation = random.one_of<int64_t>({CONCAT, SUM, MEAN, MULT});
            const int64_t columns = random.between(1, 3), first = random.below(4), size = random.between(1, 200);
            std::vector<int64_t> codes(static_cast<std::size_t>((first + known) * columns));
            for (int64_t& value : codes) value = random.below(size);
            const int64_t number = code(columns, codes);
            int64_t column = 0;
            for (int64_t c = 0; lookup.operation == CONCAT ? column < dim : c < 3; ++c) {
                const int64_t width = lookup.operation != CONCAT ? dim : random.chance(2) ? dim - column : random.between(1, dim - column);
                const bool sign = (lookup.operation == SUM || lookup.operation == MEAN) && random.chance(3);
                const Slab rows_of_code = slab(width, size, false);
                if (c && random.chance(4)) {
                    add_piece(hash, rows_of_code, random.any(), size, width, column, sign);
                } else {
                    add_piece(CODED, rows_of_code, first * columns + random.below(columns), size, width, column, false);
                    pieces.back().code = number;
                }
                if (lookup.operation == CONCAT) column += width;
            }
            break;
        }
        case 11:
        case 12: {  // lists, some of them empty, and some longer than what is read
            lookup.operation = random.one_of<int64_t>({LIST_SUM, LIST_MEAN});
            const int64_t longest = random.between(1, 5), first = random.below(4), size = random.between(1, 200);
            std::vector<int64_t> begins{0}, values;
            while (static_cast<int64_t>(begins.size()) <= first + known) begins.push_back(begins.back() + random.between(0, longest + 1));
            for (int64_t i = 0; i < begins.back(); ++i) values.push_back(random.below(size));
            add_piece(LISTED, slab(dim, size, true), first, size, dim, 0, false);
            const int64_t number = code(1, begins);
            pieces.back().code = number, pieces.back().values = code(1, values);
            lookup.num_rows = longest;
            break;
        }
        default: {  // blocks of a circular array
            has_blocks = true;
            const int64_t block = random.one_of<int64_t>({1, 4, 8, dim, std::max<int64_t>(1, dim / 2)}), most = std::min(block, dim);
            const int64_t size = random.one_of<int64_t>({most, most + 1 + random.below(3), 1024 + random.below(20), random.between(200, 3000)});
            const bool signs = random.chance(2);
            const Slab array = slab(1, size, true, true);
            for (int64_t column = 0; column < dim; column += block)
                add_piece(balances ? BALANCED_BLOCK : BLOCK, array, random.any(), size, std::min(block, dim - column), column, signs);
        }
    }
    lookup.num_pieces = static_cast<int64_t>(pieces.size()) - lookup.first_piece;
    if (lookup.operation != LIST_SUM && lookup.operation != LIST_MEAN)
        lookup.num_rows = lookup.operation == MIXED ? 1 : lookup.num_pieces;
}

void Case::make_program() {
    num_features = random.between(1, 4);
    halves = random.chance(4);
    if (!random.chance(4)) widths = {1}, rows = {0};  // so that arrays of blocks lie where they are meant to
    lookups.resize(random.between(1, 6));
    for (Lookup& lookup : lookups) {
        lookup = Lookup{};
        make_lookup(lookup);
        rows_per_example += lookup.num_rows;
    }
    write_program();
}

void Case::write_program() {
    std::vector<int64_t> all{num_features, static_cast<int64_t>(lookups.size()), static_cast<int64_t>(pieces.size()),
                             static_cast<int64_t>(widths.size()), static_cast<int64_t>(projections.size()), static_cast<int64_t>(integers.size()),
                             static_cast<int64_t>(rests.size())};
    auto append = [&](const auto& structs) {
        for (const auto& each : structs) {
            const int64_t* fields = reinterpret_cast<const int64_t*>(&each);
            all.insert(all.end(), fields, fields + sizeof each / 8);
        }
    };
    append(lookups);
    append(rests);
    append(pieces);
    int64_t start = 0;
    for (std::size_t w = 0; w < widths.size(); ++w) {
        if (halves) all.insert(all.end(), {widths[w], start, BRAINS, 16, 1, 2 * widths[w]});
        else all.insert(all.end(), {widths[w], start, PLAIN, 0, 0, 4 * widths[w]});
        start += rows[w];
    }
    all.insert(all.end(), {0, start, PLAIN, 0, 0, 0});
    append(projections);
    for (const Integers& code : integers) all.insert(all.end(), {code.bytes, code.columns, static_cast<int64_t>(code.values.size())});
    words = Memory(static_cast<int64_t>(all.size()), 8);
    std::memcpy(words.data(), all.data(), all.size() * 8);
    for (const Integers& code : integers) {
        codes.emplace_back(static_cast<int64_t>(code.values.size()), code.bytes);
        // Of little-endian integers the first bytes are those of the shorter type.
        for (std::size_t i = 0; i < code.values.size(); ++i)
            std::memcpy(codes.back().as<char>() + static_cast<int64_t>(i) * code.bytes, &code.values[i], static_cast<std::size_t>(code.bytes));
    }
}

void Case::make_input() {
    jagged = random.chance(2), weighted = random.chance(3), narrow_ids = random.chance(2);
    batch = random.one_of<int64_t>({0, 1, 2, 5, 63, 64, 65, 130, 300, 700, 1100});
    offsets.assign(1, 0);
    if (jagged) {
        const int64_t longest = random.one_of<int64_t>({0, 1, 3, 3, 3, 70});
        if (longest == 70) batch = std::min<int64_t>(batch, 65);
        for (int64_t i = 0; i < num_features * batch; ++i) offsets.push_back(offsets.back() + random.between(0, longest));
    }
    num_ids = jagged ? offsets.back() : num_features * batch;
    ids.resize(num_ids);
    // One id has to suit all tables of its feature. Few different ones, so that rows occur often.
    for (int64_t f = 0; f < num_features; ++f) {
        int64_t size = int64_t{1} << 62;
        bool refuses = false, any = true;
        for (const Lookup& lookup : lookups)
            if (lookup.column == f) {
                if (lookup.policy == REFUSE) refuses = true, size = std::min(size, lookup.size);
                if (lookup.policy != ANY) any = false, size = std::min(size, lookup.size + 3);
            }
        const int64_t limit = narrow_ids ? std::min<int64_t>(size, INT32_MAX) : size;
        std::vector<int64_t> pool;
        const int64_t different = random.one_of<int64_t>({1, 3, 50, 400});
        for (int64_t i = 0; i < different; ++i) {
            int64_t id = random.chance(3) ? random.below(std::min<int64_t>(limit, 5)) : random.below(limit);
            if (!refuses && random.chance(any ? 2 : 6))
                id = narrow_ids ? random.one_of<int64_t>({INT32_MIN, INT32_MAX, -1, static_cast<int32_t>(random.any())})
                                : random.one_of<int64_t>({INT64_MIN, INT64_MAX, -1, random.any()});
            pool.push_back(id);
        }
        auto draw = [&](int64_t at) { ids[at] = pool[random.below(different)]; };
        if (jagged)
            for (int64_t i = offsets[f * batch]; i < offsets[(f + 1) * batch]; ++i) draw(i);
        else
            for (int64_t b = 0; b < batch; ++b) draw(b * num_features + f);
    }
    id_memory = Memory(num_ids, narrow_ids ? 4 : 8, random.below(2));
    for (int64_t i = 0; i < num_ids; ++i)
        if (narrow_ids)
            id_memory.as<int32_t>()[i] = static_cast<int32_t>(ids[i]);
        else
            id_memory.as<int64_t>()[i] = ids[i];
    offset_memory = Memory(static_cast<int64_t>(offsets.size()), 8);
    std::memcpy(offset_memory.data(), offsets.data(), offsets.size() * 8);
    if (weighted) id_weights = scalars(num_ids, FLOAT32, -1.5, 1.5);
    num_rows = 0;
    for (const Lookup& lookup : lookups) {
        const int64_t f = lookup.column;
        num_rows += lookup.num_rows * (jagged ? offsets[(f + 1) * batch] - offsets[f * batch] : batch);
    }
    // Side by side, with a gap behind each example; or one after another, where bags need not be pooled.
    int64_t all_dims = random.below(3);
    for (const Lookup& lookup : lookups) all_dims += lookup.dim;
    const bool side_by_side = random.chance(2);
    int64_t start = 0;
    for (const Lookup& lookup : lookups) {
        const int64_t pooling = random.one_of<int64_t>({side_by_side && jagged ? POOL_SUM : NONE, POOL_SUM, POOL_MEAN});
        outputs.push_back({start, side_by_side ? all_dims : lookup.dim, pooling});
        const int64_t own = offsets[jagged ? (lookup.column + 1) * batch : 0] - offsets[jagged ? lookup.column * batch : 0];
        start += lookup.dim * (side_by_side ? 1 : jagged && pooling == NONE ? own : batch);
    }
    num_values = side_by_side ? batch * all_dims : start;
}

// Exact in every type.
Memory Case::scalars(int64_t count, int64_t type, double low, double high) {
    Memory memory(count, bytes_of(type), random.below(4));
    for (int64_t i = 0; i < count; ++i) {
        const double value = low + (high - low) * random.uniform();
        encode(memory.data(), i, type, type == FLOAT32 ? value : std::round(value * 32) / 32);
    }
    return memory;
}

void Case::make_values(int64_t last_rule) {
    dtype = halves ? static_cast<int64_t>(FLOAT32) : random.one_of<int64_t>({FLOAT32, FLOAT32, FLOAT32, BFLOAT16, FLOAT16});
    state_dtype = random.chance(2) ? FLOAT32 : dtype;
    do rule = random.between(SGD, last_rule);
    while (rule == ROWWISE_ADAGRAD && has_blocks);
    if (rule == SGD || rule >= DENSE_GRADIENT) state_dtype = FLOAT32;
    hyper = {0.1, random.chance(2) ? 0.05 : 0.0};
    if (rule != SGD) hyper.push_back(1e-3);
    if (rule == ADAM) hyper.insert(hyper.end(), {0.9, 0.99});
    averaged = rule <= ADAM && !halves && dtype == FLOAT32 && state_dtype == FLOAT32 && random.chance(3);
    if (averaged) hyper.push_back(random.one_of<double>({1, 2, 1000}));
    if (random.chance(2)) hyper.push_back(random.one_of<double>({0.0, 0.3, 3.0}));
    step = random.between(1, 4);
    gradient = scalars(num_values, dtype, -1, 1);
    auto with_states = [&](int64_t num, int64_t width, int64_t type, std::vector<Memory>& values, std::vector<Memory>& state) {
        values.push_back(scalars(num * width, type, -1, 1));
        for (int64_t s = 0; s < STATES; ++s) {
            if (s >= 2) {
                if (averaged) state.push_back(s == 2 ? scalars(num * width, FLOAT32, -1, 1) : scalars(num, FLOAT32, 0, static_cast<double>(step - 1)));
                else state.push_back(Memory());
                continue;
            }
            const bool has = rule == ADAM || (s == 0 && (rule == ADAGRAD || rule == ROWWISE_ADAGRAD));
            const bool squares = rule != ADAM || s == 1;
            state.push_back(has ? scalars(rule == ROWWISE_ADAGRAD ? num : num * width, state_dtype, squares ? 0.25 : -1, 1) : Memory());
        }
    };
    for (std::size_t w = 0; w < widths.size(); ++w) with_states(rows[w], widths[w], weight_type(), weights, states);
    if (random.chance(3))
        for (int64_t count : rows) strengths.push_back(random.chance(4) ? Memory() : scalars(count, FLOAT32, 0, 1));
    for (const Projection& p : projections) with_states(p.width, p.dim, dtype, projection_weights, projection_states);
}

void Case::make() {
    make_program();
    make_input();
    make_values(SPARSE_GRADIENT);
    keeps_rows = random.chance(2);
    // Gradients of rows as they were say nothing of how strongly L2 pulls them: it goes by what they are.
    if (keeps_rows && rule >= DENSE_GRADIENT) strengths.clear();
}

// Lookups of sparse rows, which nothing trains.
void Case::make_sparse() {
    num_features = random.between(1, 3), halves = random.chance(3);
    lookups.resize(random.between(1, 4));
    for (Lookup& lookup : lookups) {
        lookup = Lookup{};
        lookup.column = random.below(num_features);
        lookup.size = random.between(1, 200);
        lookup.policy = random.one_of<int64_t>({REFUSE, FOLD, OOV});
        lookup.fold_seed = random.any();
        lookup.has_padding = random.chance(2);
        lookup.padding = lookup.has_padding ? random.below(std::min<int64_t>(lookup.size, 4)) : -1;
        lookup.dim = lookup.inner = random.chance(6) ? random.between(101, 300) : any_width(random);
        lookup.operation = SPARSE;
        lookup.first_piece = static_cast<int64_t>(pieces.size()), lookup.num_pieces = lookup.num_rows = 1;
        lookup.code = lookup.projection = lookup.inner_projection = lookup.rest = -1;
        make_matrix(lookup, lookup.size + (lookup.policy == OOV));
    }
    rows_per_example = static_cast<int64_t>(lookups.size());
    write_program();
    make_input();
    make_values(SGD);
    strengths.clear();
}

void Case::make_matrix(const Lookup& lookup, int64_t known) {
    const int64_t dim = lookup.dim, from = random.below(4), num = from + known + random.below(3);
    const double density = random.one_of<double>({0.01, 0.1, 0.5, 1.0});
    std::vector<int64_t> of_rows, columns;
    for (int64_t at = 0; at < num * dim; ++at)
        if (random.uniform() < density) of_rows.push_back(at / dim), columns.push_back(at % dim);
    if (columns.empty()) of_rows.push_back(0), columns.push_back(0);
    const int64_t size = static_cast<int64_t>(columns.size()), kind = random.between(BITMAP, ENTRIES);
    int64_t first, second;
    if (kind == BITMAP) {
        const int64_t blocks = (num * dim + 511) / 512;
        std::vector<int64_t> words(static_cast<std::size_t>(8 * blocks), 0), before(static_cast<std::size_t>(blocks), 0);
        for (int64_t k = 0; k < size; ++k) {
            const int64_t bit = of_rows[k] * dim + columns[k];
            words[bit / 64] = static_cast<int64_t>(static_cast<uint64_t>(words[bit / 64]) | uint64_t{1} << bit % 64);
            for (int64_t block = bit / 512 + 1; block < blocks; ++block) ++before[block];
        }
        if (random.chance(4)) words[random.below(8 * blocks)] = random.any();  // more bits than there are values, or fewer
        integers.push_back({8, 1, std::move(words)});
        first = static_cast<int64_t>(integers.size()) - 1, second = code(1, std::move(before));
    } else {
        std::vector<int64_t> index;
        if (kind == ENTRIES) index = of_rows;
        else for (int64_t row = 0; row <= num; ++row) index.push_back(std::lower_bound(of_rows.begin(), of_rows.end(), row) - of_rows.begin());
        first = code(1, std::move(columns)), second = code(1, std::move(index));
        const std::vector<int64_t>& read = integers[second].values;
        unordered |= kind == ENTRIES && !std::is_sorted(read.begin(), read.end());
    }
    pieces.push_back({kind, static_cast<int64_t>(widths.size()), 0, from, 0, dim, 0, 0, 0, -1, first, second, 0, size, 0, 0, 0});
    widths.push_back(1), rows.push_back(size);
}

// One lookup with a row an id.
void Case::make_single() {
    const int64_t width = random.one_of<int64_t>({1, 2, 3, 4, 8, 16, 17, 32, 64, 100}), num = random.between(1, 300);
    num_features = 1, halves = random.chance(3);
    batch = num_ids = num_rows = random.one_of<int64_t>({0, 1, 5, 40, 999});
    num_values = num_ids * width;
    Lookup lookup{};
    lookup.size = num, lookup.dim = lookup.inner = width, lookup.num_pieces = lookup.num_rows = 1, lookup.code = lookup.rest = -1;
    lookup.projection = lookup.inner_projection = -1;
    lookups = {lookup};
    add_piece(ROW, slab(width, num, false), 0, 0, width, 0, false);
    outputs = {{0, width, NONE}};
    for (int64_t i = 0; i < num_ids; ++i) ids.push_back(random.below(random.chance(2) ? num : std::min<int64_t>(num, 3)));
    for (int64_t& id : ids) id += pieces[0].base;
    lookups[0].size += pieces[0].base, pieces[0].base = 0;
    make_values(ADAM);
    strengths.clear();  // L2 by the row is for whole programs
}

// ---- the same in float64 -----------------------------------------------------------------------------------------------

struct Expected {
    std::vector<double> values;
    std::vector<bool> written;
    std::vector<std::vector<double>> weights, projections, states, projection_states;
    std::vector<std::vector<double>> gradients, projection_gradients;
    std::vector<std::vector<double>> projection_sizes;  // the sum of the magnitudes of a gradient's terms
    std::vector<std::vector<bool>> touched;  // rows of each weight
};

// A scalar of an id's vector is a sum over terms, or the product of factors: of one weight's scalars.
struct Scalar {
    int64_t weight, row, at;
};

class Reference {
public:
    explicit Reference(const Case& c) : c_(c) {}
    Expected run();

private:
    const Case& c_;
    Expected e_;

    double weight(const Scalar& s) const { return decoded(c_.weights[s.weight].data(), s.row * c_.widths[s.weight] + s.at, c_.weight_type()); }
    bool known(const Lookup& lookup, int64_t id, int64_t& taken) const;
    int64_t row(const Piece& piece, int64_t x) const;
    std::vector<int64_t> list(const Lookup& lookup, const Piece& piece, int64_t x) const;
    std::vector<double> sparse(const Piece& piece, int64_t x) const;
    void add(const Scalar& s, double gradient) {
        e_.gradients[s.weight][s.row * c_.widths[s.weight] + s.at] += gradient;
        e_.touched[s.weight][s.row] = true;
    }
    void add_to_projection(int64_t number, int64_t at, double gradient) {
        e_.projection_gradients[number][at] += gradient;
        e_.projection_sizes[number][at] += std::fabs(gradient);
    }
    // The vector of an id, and with `gradient` what reaches its rows.
    std::vector<double> vector(const Lookup& lookup, int64_t id, const double* gradient);
    std::vector<double> combination(const Lookup& lookup, int64_t taken, int64_t x, const double* gradient);
    std::vector<double> projected(int64_t number, const std::vector<double>& u, const double* gradient, std::vector<double>& u_gradient);
    void bag(int64_t l, int64_t first, int64_t last, int64_t stride, int64_t at, bool pools);
    void update(std::vector<double>& w, std::vector<double>* s, const std::vector<double>& gradient, int64_t row, int64_t width) const;
};

// The id as its table takes it; false for padding.
bool Reference::known(const Lookup& lookup, int64_t id, int64_t& taken) const {
    taken = id;
    if (lookup.policy != ANY && (id < 0 || id >= lookup.size)) {
        EXPECT(lookup.policy != REFUSE, "the driver made an id that is refused");
        if (lookup.policy == OOV) {
            taken = lookup.size;
        } else {
            taken = hashed(id, lookup.fold_seed, lookup.size);
            if (lookup.has_padding && taken == lookup.padding) taken = (taken + 1) % lookup.size;
        }
    }
    return !(lookup.has_padding && taken == lookup.padding);
}

int64_t Reference::row(const Piece& piece, int64_t x) const {
    switch (piece.kind) {
        case HASH:
        case BLOCK: return hashed(x, piece.a, piece.b);
        case BALANCED: return dealt(x, piece, 1);
        case BALANCED_BLOCK: return dealt(x, piece, piece.width);
        case DIGIT: return x / piece.a % piece.b;
        case CUT: return std::min(x, piece.a);
        case CODED: {
            const Integers& code = c_.integers[piece.code];
            const int64_t row = code.values.at(piece.a + x * code.columns);
            return row < 0 || row >= piece.b ? 0 : row;
        }
        default: return x;
    }
}

// The rows of a list: of what is damaged, those that there are, and its first row for a row that the slab does not have.
std::vector<int64_t> Reference::list(const Lookup& lookup, const Piece& piece, int64_t x) const {
    const Integers &begins = c_.integers[piece.code], &values = c_.integers[piece.values];
    std::vector<int64_t> rows;
    const int64_t begin = begins.values.at(piece.a + x), end = begins.values.at(piece.a + x + 1);
    if (begin < 0) return rows;
    for (int64_t i = begin; i < end && i < static_cast<int64_t>(values.values.size()); ++i) {
        if (static_cast<int64_t>(rows.size()) == lookup.num_rows) break;
        rows.push_back(values.values[i] < 0 || values.values[i] >= piece.b ? 0 : values.values[i]);
    }
    return rows;
}

// A row of a sparse matrix: of what is damaged, the values that there are, in the columns that there are.
std::vector<double> Reference::sparse(const Piece& piece, int64_t x) const {
    const std::vector<int64_t> &first = c_.integers[piece.code].values, &second = c_.integers[piece.values].values;
    const int64_t row = piece.a + x, size = piece.rows;
    std::vector<double> out(piece.width, 0.0);
    auto take = [&](int64_t at, int64_t column) {
        if (at >= 0 && at < size && column >= 0 && column < piece.width) out[column] = weight({piece.weight, at, 0});
    };
    if (piece.kind == BITMAP) {
        auto is_set = [&](int64_t bit) { return static_cast<uint64_t>(first.at(bit / 64)) >> bit % 64 & 1; };
        const int64_t begin = row * piece.width;
        uint64_t next = static_cast<uint64_t>(second.at(begin / 512));  // which may be any number
        for (int64_t bit = begin / 512 * 512; bit < begin; ++bit) next += is_set(bit);
        if (next >= static_cast<uint64_t>(size)) return out;
        for (int64_t d = 0; d < piece.width; ++d)
            if (is_set(begin + d)) take(static_cast<int64_t>(next++), d);
    } else if (piece.kind == COMPRESSED) {
        const int64_t begin = second.at(row), end = std::min(second.at(row + 1), size);
        for (int64_t at = begin; begin >= 0 && at < end; ++at) take(at, first.at(at));
    } else {
        for (int64_t at = 0; at < size; ++at)
            if (second.at(at) == row) take(at, first.at(at));
    }
    return out;
}

std::vector<double> Reference::vector(const Lookup& lookup, int64_t id, const double* gradient) {
    std::vector<double> out(lookup.dim, 0.0);
    int64_t taken = 0;
    if (!known(lookup, id, taken) || lookup.num_pieces == 0) return out;
    int64_t x = taken;
    if (lookup.code >= 0) {
        x = c_.integers[lookup.code].values.at(lookup.ranks_from + x);
        if (x < 0 || x >= lookup.size + (lookup.policy == OOV)) x = 0;
    }
    if (lookup.operation == SPARSE) return sparse(c_.pieces[lookup.first_piece], x);
    const int64_t held = c_.pieces[lookup.first_piece + lookup.num_pieces - 1].a;
    const bool beyond = lookup.rest >= 0 && x >= held;
    const Lookup& by = beyond ? c_.rests[lookup.rest - static_cast<int64_t>(c_.lookups.size())] : lookup;
    if (beyond) x -= held;
    if (by.num_pieces == 0) return out;
    if (by.projection < 0) {
        const std::vector<double> joined = combination(by, taken, x, gradient);
        std::copy(joined.begin(), joined.end(), out.begin());
        return out;
    }
    const std::vector<double> u = combination(by, taken, x, nullptr);
    std::vector<double> u_gradient(by.inner, 0.0);
    if (by.inner_projection < 0) {
        out = projected(by.projection, u, gradient, u_gradient);
    } else {
        std::vector<double> nothing, middle_gradient(by.middle, 0.0);
        out = projected(by.projection, projected(by.inner_projection, u, nullptr, nothing), gradient, middle_gradient);
        if (gradient) projected(by.inner_projection, u, middle_gradient.data(), u_gradient);
    }
    if (gradient) combination(by, taken, x, u_gradient.data());
    return out;
}

// u · projection, and with `gradient` what reaches u and the projection.
std::vector<double> Reference::projected(int64_t number, const std::vector<double>& u, const double* gradient,
                                         std::vector<double>& u_gradient) {
    const Projection& shape = c_.projections[number];
    std::vector<double> out(shape.dim, 0.0);
    for (int64_t j = 0; j < shape.width; ++j)
        for (int64_t d = 0; d < shape.dim; ++d) {
            const int64_t at = j * shape.dim + d;
            const double p = decoded(c_.projection_weights[number].data(), at, c_.dtype);
            out[d] += u[j] * p;
            if (!gradient) continue;
            u_gradient[j] += gradient[d] * p;
            add_to_projection(number, at, gradient[d] * u[j]);
        }
    return out;
}

std::vector<double> Reference::combination(const Lookup& lookup, int64_t taken, int64_t x, const double* gradient) {
    std::vector<double> out(lookup.inner, 0.0);
    const Piece* pieces = c_.pieces.data() + lookup.first_piece;
    if (pieces->kind == LISTED) {
        const std::vector<int64_t> rows = list(lookup, *pieces, x);
        const double factor = lookup.operation == LIST_MEAN && !rows.empty() ? 1 / static_cast<double>(rows.size()) : 1;
        for (int64_t at : rows)
            for (int64_t d = 0; d < lookup.inner; ++d) {
                const Scalar s{pieces->weight, pieces->base + at, d};
                out[d] += factor * weight(s);
                if (gradient) add(s, factor * gradient[d]);
            }
        return out;
    }
    if (lookup.operation == MIXED) {
        const Piece* piece = pieces;
        while (x >= piece->a) ++piece;
        for (int64_t j = 0; j < piece->width; ++j) {
            const Scalar s{piece->weight, piece->base + x, j};
            if (piece->projection < 0) {
                out[j] = weight(s);
                if (gradient) add(s, gradient[j]);
                continue;
            }
            const Memory& projection = c_.projection_weights[piece->projection];
            double sum = 0;
            for (int64_t d = 0; d < lookup.dim; ++d) {
                const double p = decoded(projection.data(), j * lookup.dim + d, c_.dtype);
                out[d] += weight(s) * p;
                if (!gradient) continue;
                sum += gradient[d] * p;
                add_to_projection(piece->projection, j * lookup.dim + d, gradient[d] * weight(s));
            }
            if (gradient) add(s, sum);
        }
        return out;
    }
    const double count = static_cast<double>(lookup.num_pieces);
    for (int64_t d = 0; d < lookup.inner; ++d) {
        double product = 1;
        for (int64_t c = 0; c < lookup.num_pieces; ++c) {
            const Piece& piece = pieces[c];
            const int64_t k = lookup.operation == CONCAT ? d - piece.column : d;
            if (k < 0 || k >= piece.width) continue;
            auto scalar = [&](const Piece& p) {
                const int64_t at = row(p, x);
                if (p.is_block()) return Scalar{p.weight, p.base + (at + k) % p.b, 0};
                return Scalar{p.weight, p.base + at, k};
            };
            const double factor = sign_of(piece, taken) / (lookup.operation == MEAN ? count : 1);
            if (lookup.operation != MULT) {
                out[d] += factor * weight(scalar(piece));
                if (gradient) add(scalar(piece), factor * gradient[d]);
                continue;
            }
            product *= weight(scalar(piece));
            out[d] = product;
            if (!gradient) continue;
            double others = gradient[d];
            for (int64_t o = 0; o < lookup.num_pieces; ++o)
                if (o != c) others *= weight(scalar(pieces[o]));
            add(scalar(piece), others);
        }
    }
    return out;
}

// The ids first, first + stride … before last make the output's row `at`.
void Reference::bag(int64_t l, int64_t first, int64_t last, int64_t stride, int64_t at, bool pools) {
    const Lookup& lookup = c_.lookups[l];
    const Output& output = c_.outputs[l];
    double divisor = 1;
    if (pools && output.pooling == POOL_MEAN) {
        int64_t count = 0, ignored;
        for (int64_t i = first; i < last; i += stride) count += known(lookup, c_.ids[i], ignored);
        divisor = static_cast<double>(std::max<int64_t>(count, 1));
    }
    std::vector<double> gradient(lookup.dim), own(lookup.dim), sum(lookup.dim, 0.0);
    const int64_t begin = output.start + at * output.stride;
    for (int64_t d = 0; d < lookup.dim; ++d) gradient[d] = decoded(c_.gradient.data(), begin + d, c_.dtype);
    for (int64_t i = first; i < last; i += stride) {
        const double factor = (c_.weighted ? decoded(c_.id_weights.data(), i, FLOAT32) : 1) / divisor;
        for (int64_t d = 0; d < lookup.dim; ++d) own[d] = factor * gradient[d];
        const std::vector<double> v = vector(lookup, c_.ids[i], own.data());
        for (int64_t d = 0; d < lookup.dim; ++d) sum[d] += factor * v[d];
    }
    for (int64_t d = 0; d < lookup.dim; ++d) e_.values[begin + d] = sum[d], e_.written[begin + d] = true;
}

void Reference::update(std::vector<double>& w, std::vector<double>* s, const std::vector<double>& gradient, int64_t row, int64_t width) const {
    const auto number = [&](size_t i) { return i < c_.hyper.size() ? c_.hyper[i] : 0; };
    const double lr = number(0), l2 = number(1), eps = number(2), beta1 = number(3), beta2 = number(4);
    const size_t own = c_.rule == SGD ? 2 : c_.rule == ADAM ? 5 : 3;
    const double horizon = number(own), clip = number(own + c_.averaged);
    const std::vector<double> before(w.begin() + row * width, w.begin() + (row + 1) * width);
    std::vector<double> g(gradient.begin() + row * width, gradient.begin() + (row + 1) * width);
    double squares = 0;
    for (double x : g) squares += x * x;
    if (clip > 0)
        for (double& x : g) x *= clip / std::max(clip, std::sqrt(squares));
    squares = 0;
    for (int64_t d = 0; d < width; ++d) g[d] += l2 * w[row * width + d], squares += g[d] * g[d];
    if (c_.rule == ROWWISE_ADAGRAD) s[0][row] += squares / static_cast<double>(width);
    for (int64_t d = 0; d < width; ++d) {
        double& x = w[row * width + d];
        switch (c_.rule) {
            case SGD: x -= lr * g[d]; break;
            case ROWWISE_ADAGRAD: x -= lr * g[d] / (std::sqrt(s[0][row]) + eps); break;
            case ADAGRAD: {
                double& total = s[0][row * width + d];
                total += g[d] * g[d];
                x -= lr * g[d] / (std::sqrt(total) + eps);
                break;
            }
            case ADAM: {
                double &m = s[0][row * width + d], &v = s[1][row * width + d];
                m = beta1 * m + (1 - beta1) * g[d];
                v = beta2 * v + (1 - beta2) * g[d] * g[d];
                const double k = static_cast<double>(c_.step);
                x -= lr * (m / (1 - std::pow(beta1, k))) / (std::sqrt(v / (1 - std::pow(beta2, k))) + eps);
            }
        }
    }
    if (!c_.averaged) return;
    // What is left of a mean after the steps up to one: 1/(t + 1) of it up to the horizon, then always the same part.
    const auto left = [&](double t) { return std::pow(horizon / (horizon + 1), t - std::min(t, horizon)) / (1 + std::min(t, horizon)); };
    const double now = static_cast<double>(c_.step);
    for (int64_t d = 0; d < width; ++d) {
        double& behind = s[2][row * width + d];
        behind = left(now) / left(now - 1) * (left(now - 1) / left(s[3][row]) * behind + before[d] - w[row * width + d]);
    }
    s[3][row] = now;
}

static std::vector<double> all_decoded(const Memory& memory, int64_t dtype) {
    std::vector<double> out(static_cast<std::size_t>(memory.count()));
    for (int64_t i = 0; i < memory.count(); ++i) out[i] = decoded(memory.data(), i, dtype);
    return out;
}

Expected Reference::run() {
    e_.values.assign(c_.num_values, 0.0);
    e_.written.assign(c_.num_values, false);
    for (std::size_t w = 0; w < c_.widths.size(); ++w) {
        e_.gradients.emplace_back(c_.rows[w] * c_.widths[w], 0.0);
        e_.touched.emplace_back(c_.rows[w], false);
        e_.weights.push_back(all_decoded(c_.weights[w], c_.weight_type()));
    }
    for (std::size_t p = 0; p < c_.projections.size(); ++p) {
        e_.projection_gradients.emplace_back(c_.projections[p].width * c_.projections[p].dim, 0.0);
        e_.projection_sizes.push_back(e_.projection_gradients.back());
        e_.projections.push_back(all_decoded(c_.projection_weights[p], c_.dtype));
    }
    for (const Memory& state : c_.states) e_.states.push_back(all_decoded(state, c_.state_dtype));
    for (const Memory& state : c_.projection_states) e_.projection_states.push_back(all_decoded(state, c_.state_dtype));
    for (std::size_t l = 0; l < c_.lookups.size(); ++l) {
        const int64_t f = c_.lookups[l].column;
        for (int64_t b = 0; b < c_.batch; ++b) {
            if (!c_.jagged) {
                bag(l, b * c_.num_features + f, b * c_.num_features + f + 1, 1, b, false);
                continue;
            }
            const int64_t first = c_.offsets[f * c_.batch + b], last = c_.offsets[f * c_.batch + b + 1];
            if (c_.outputs[l].pooling != NONE) {
                bag(l, first, last, 1, b, true);
            } else {
                for (int64_t i = first; i < last; ++i) bag(l, i, i + 1, 1, i - c_.offsets[f * c_.batch], false);
            }
        }
    }
    for (std::size_t w = 0; w < c_.strengths.size(); ++w)
        for (int64_t r = 0; c_.strengths[w].data() && r < c_.rows[w]; ++r)
            for (int64_t d = 0; e_.touched[w][r] && d < c_.widths[w]; ++d)
                e_.gradients[w][r * c_.widths[w] + d] +=
                    decoded(c_.strengths[w].data(), r, FLOAT32) * e_.weights[w][r * c_.widths[w] + d];
    if (c_.rule >= DENSE_GRADIENT) return e_;
    for (std::size_t w = 0; w < c_.widths.size(); ++w)
        for (int64_t r = 0; r < c_.rows[w]; ++r)
            if (e_.touched[w][r]) update(e_.weights[w], &e_.states[STATES * w], e_.gradients[w], r, c_.widths[w]);
    for (std::size_t p = 0; p < c_.projections.size(); ++p)
        for (int64_t r = 0; c_.projections[p].trained && r < c_.projections[p].width; ++r)
            update(e_.projections[p], &e_.projection_states[STATES * p], e_.projection_gradients[p], r, c_.projections[p].dim);
    return e_;
}

// ---- the library ---------------------------------------------------------------------------------------------------------

static std::vector<void*> pointers(const std::vector<Memory>& memories) {
    std::vector<void*> out;
    for (const Memory& memory : memories) out.push_back(memory.data());
    if (out.empty()) out.push_back(nullptr);
    return out;
}

// What a step leaves behind.
struct Result {
    Memory values, rows;
    std::vector<Memory> weights, projections, states, projection_states;  // or their gradients
    std::vector<Memory> gradient_rows;
    std::vector<int64_t> num_gradient_rows;
};

// A call and all that it points to.
struct Step {
    const Case& c;
    const Functions& functions;
    Result r;
    Memory kept;
    std::vector<void*> weights, projections, codes, states, projection_states, strengths, into, into_projections, gradient_rows;
    Call call{}, target{};

    Step(const Case& made, const Functions& with, int64_t num_threads) : c(made), functions(with) {
        r.values = Memory(c.num_values, bytes_of(c.dtype));
        r.rows = Memory(c.num_rows, 8);
        r.weights = c.weights, r.projections = c.projection_weights;
        r.states = c.states, r.projection_states = c.projection_states;
        weights = pointers(r.weights), projections = pointers(r.projections), codes = pointers(c.codes);
        states = pointers(r.states), projection_states = pointers(r.projection_states);
        for (std::size_t p = 0; p < STATES * c.projections.size(); ++p)
            if (!c.projections[p / STATES].trained) projection_states[p] = nullptr;
        call.program = c.words.as<int64_t>();
        call.ids = c.id_memory.data(), call.id_bytes = c.narrow_ids ? 4 : 8;
        call.offsets = c.jagged ? c.offset_memory.as<int64_t>() : nullptr;
        call.num_ids = c.num_ids, call.batch = c.batch;
        call.id_weights = c.weighted ? c.id_weights.as<float>() : nullptr;
        call.weights = weights.data(), call.projections = projections.data();
        call.codes = codes.data();
        call.outputs = c.outputs.data(), call.values = r.values.data(), call.rows = r.rows.as<int64_t>();
        call.dtype = c.dtype, call.state_dtype = c.state_dtype, call.num_threads = num_threads;
        call.rule = c.whole_rule(), call.hyper = c.hyper.data(), call.num_hyper = static_cast<int64_t>(c.hyper.size());
        call.step = c.step, call.states = states.data(), call.projection_states = projection_states.data();
        strengths = pointers(c.strengths);
        call.strengths = c.strengths.empty() ? nullptr : reinterpret_cast<const float* const*>(strengths.data());
    }

    Outcome forward() { return functions.forward(call); }

    // As embtables/ops/native.py calls it.
    void backward() {
        call.values = c.gradient.data();
        target = call;
        if (c.rule >= DENSE_GRADIENT) {
            int64_t widest = 1;
            for (const Output& output : c.outputs) widest = std::max(widest, output.stride);
            std::vector<Memory> values, values_of_projections;
            for (std::size_t w = 0; w < c.widths.size(); ++w) {
                int64_t most = c.rows[w];
                if (c.rule == SPARSE_GRADIENT) {
                    most = std::min(most, c.num_rows * (c.widths[w] == 1 ? widest : 1));
                    r.gradient_rows.emplace_back(most, 8);
                }
                values.emplace_back(most * c.widths[w], bytes_of(c.dtype));
                if (most) std::memset(values.back().data(), 0, static_cast<std::size_t>(most * c.widths[w] * bytes_of(c.dtype)));
            }
            for (const Projection& p : c.projections) values_of_projections.emplace_back(p.width * p.dim, bytes_of(c.dtype));
            into = pointers(values), into_projections = pointers(values_of_projections), gradient_rows = pointers(r.gradient_rows);
            for (std::size_t p = 0; p < c.projections.size(); ++p)
                if (!c.projections[p].trained) into_projections[p] = nullptr;  // nobody asks for its gradient
            target.weights = into.data(), target.projections = into_projections.data();
            if (c.keeps_rows) {
                // The weights may have changed since the lookup: what a gradient depends on was noted.
                kept = Memory(functions.keep_rows(call), bytes_of(c.dtype));
                call.saved = kept.data();
                functions.keep_rows(call);
                for (Memory& weight : r.weights)
                    if (weight.count()) std::memset(weight.data(), 0xff, static_cast<std::size_t>(weight.count() * bytes_of(c.weight_type())));
            }
            if (c.rule == SPARSE_GRADIENT) {
                r.num_gradient_rows.assign(c.widths.size(), -1);
                target.gradient_rows = reinterpret_cast<int64_t* const*>(gradient_rows.data());
                target.num_gradient_rows = r.num_gradient_rows.data();
            }
            functions.backward(call, target);
            EXPECT(r.weights.size() == c.weights.size(), "weights went");
            for (std::size_t w = 0; w < c.widths.size() && !c.keeps_rows; ++w) EXPECT(r.weights[w] == c.weights[w], "gradients changed a weight");
            r.weights = std::move(values), r.projections = std::move(values_of_projections);
            return;
        }
        functions.backward(call, target);
    }
};

static double tolerance(int64_t dtype) { return dtype == FLOAT32 ? 1e-4 : dtype == BFLOAT16 ? 0x1p-6 : 0x1p-9; }

// Rounding errors of a sum grow as the square root of its terms does: a gradient through a projection has as many as columns.
static double limit_of(const Case& c) {
    int64_t widest = 32;
    for (const Lookup& lookup : c.lookups) widest = std::max(widest, lookup.dim);
    return tolerance(c.dtype) * std::sqrt(static_cast<double>(widest) / 32);
}

static void expect_close(const std::string& what, const std::vector<double>& got, const std::vector<double>& expected, double limit) {
    EXPECT(got.size() == expected.size(), what + " has another size");
    for (std::size_t i = 0; i < got.size(); ++i)
        if (got[i] != expected[i] && !(std::fabs(got[i] - expected[i]) <= limit * (1 + std::fabs(expected[i]))))
            fail(what + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " + std::to_string(expected[i]));
}

// As a type holds them that has no numbers as large as some.
static std::vector<double> held(std::vector<double> values, int64_t dtype) {
    for (double& value : values)
        if (dtype == FLOAT16 && std::fabs(value) > 65519) value = std::copysign(INFINITY, value);
    return values;
}

// Sparse gradients of weight w, as dense ones; threads and instruction sets may list rows in another order.
static Memory dense_of(const Case& c, const Result& r, std::size_t w, const std::vector<bool>& touched) {
    const int64_t size = c.widths[w] * bytes_of(c.dtype);
    Memory dense(c.rows[w] * c.widths[w], bytes_of(c.dtype));
    if (c.rows[w]) std::memset(dense.data(), 0, static_cast<std::size_t>(c.rows[w] * size));
    std::vector<bool> seen(touched.size(), false);
    const int64_t n = r.num_gradient_rows[w];
    EXPECT(n >= 0 && n <= r.gradient_rows[w].count(), "a sparse gradient has " + std::to_string(n) + " rows");
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = r.gradient_rows[w].as<int64_t>()[i];
        EXPECT(row >= 0 && row < c.rows[w] && !seen[row], "a sparse gradient has row " + std::to_string(row) + " twice or out of range");
        seen[row] = true;
        std::memcpy(dense.as<char>() + row * size, r.weights[w].as<char>() + i * size, static_cast<std::size_t>(size));
    }
    EXPECT(seen == touched, "a sparse gradient has other rows than were looked up");
    return dense;
}

static void compare_values(const Case& c, const Result& r, const Expected& e) {
    const double limit = limit_of(c);
    const Memory untouched(c.num_values, bytes_of(c.dtype));
    for (int64_t i = 0; i < c.num_values; ++i) {
        if (e.written[i]) {
            const double got = decoded(r.values.data(), i, c.dtype);
            if (!(std::fabs(got - e.values[i]) <= limit * (1 + std::fabs(e.values[i]))))
                fail("value " + std::to_string(i) + " is " + std::to_string(got) + ", expected " + std::to_string(e.values[i]));
        } else {
            const std::size_t size = static_cast<std::size_t>(bytes_of(c.dtype));
            EXPECT(std::memcmp(r.values.as<char>() + i * size, untouched.as<char>() + i * size, size) == 0,
                   "value " + std::to_string(i) + " belongs to nobody and was written");
        }
    }
}

static void compare(const Case& c, const Result& r, const Expected& e) {
    const double limit = limit_of(c);
    const double state_limit = std::max(limit, tolerance(c.state_dtype));
    compare_values(c, r, e);
    for (std::size_t w = 0; w < c.widths.size(); ++w) {
        const std::string name = "of width " + std::to_string(c.widths[w]) + " ";
        if (c.rule >= DENSE_GRADIENT) {
            const Memory dense = c.rule == SPARSE_GRADIENT ? dense_of(c, r, w, e.touched[w]) : r.weights[w];
            expect_close("gradient " + name, all_decoded(dense, c.dtype), e.gradients[w], limit * 4);
            continue;
        }
        expect_close("weight " + name, all_decoded(r.weights[w], c.weight_type()), e.weights[w], std::max(limit, tolerance(c.weight_type())));
        for (int s = 0; s < STATES; ++s)
            expect_close("state " + name, all_decoded(r.states[STATES * w + s], c.state_dtype), held(e.states[STATES * w + s], c.state_dtype), state_limit * 4);
        for (int64_t row = 0; row < c.rows[w]; ++row) {
            const int64_t size = c.widths[w] * bytes_of(c.weight_type());
            if (!e.touched[w][row])
                EXPECT(std::memcmp(r.weights[w].as<char>() + row * size, c.weights[w].as<char>() + row * size, static_cast<std::size_t>(size)) == 0,
                       "row " + std::to_string(row) + " of the weight " + name + "was not looked up and has changed");
        }
    }
    for (std::size_t p = 0; p < c.projections.size(); ++p) {
        const std::string name = "projection " + std::to_string(p) + " ";
        if (!c.projections[p].trained) {
            if (c.rule < DENSE_GRADIENT) EXPECT(r.projections[p] == c.projection_weights[p], name + "is not trained and has changed");
            continue;
        }
        const std::vector<double> got = all_decoded(r.projections[p], c.dtype);
        // All ids of a batch add to it, in fp32: thousands of terms that cancel leave what they were rounded by.
        const std::vector<double>& sizes = e.projection_sizes[p];
        const double terms = std::max(1.0, (sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end())) / 100);
        if (c.rule >= DENSE_GRADIENT) {
            expect_close("gradient of " + name, got, e.projection_gradients[p], limit * 4 * terms);
            continue;
        }
        expect_close(name, got, e.projections[p], limit * terms);
        for (int s = 0; s < STATES; ++s)
            expect_close("state of " + name, all_decoded(r.projection_states[STATES * p + s], c.state_dtype), held(e.projection_states[STATES * p + s], c.state_dtype), state_limit * 4 * terms);
    }
}

static void expect_same(const Case& c, const Result& a, const Result& b, const Expected& e) {
    EXPECT(a.values == b.values, "values have other bits than with one thread of the first instruction set");
    EXPECT(a.rows == b.rows, "addresses differ from those of one thread of the first instruction set");
    const std::string other = " has other bits than with one thread of the first instruction set";
    for (std::size_t w = 0; w < c.widths.size(); ++w) {
        if (c.rule == SPARSE_GRADIENT) {
            EXPECT(dense_of(c, a, w, e.touched[w]) == dense_of(c, b, w, e.touched[w]), "a sparse gradient" + other);
        } else {
            EXPECT(a.weights[w] == b.weights[w], "the weight of width " + std::to_string(c.widths[w]) + other);
        }
    }
    EXPECT(a.projections == b.projections, "a projection" + other);
    EXPECT(a.states == b.states && a.projection_states == b.projection_states, "a state" + other);
}

// ---- what is tried -------------------------------------------------------------------------------------------------------

static const int64_t THREADS[] = {1, 2, 5};

static void in_new_thread(const std::function<void()>& work) {
    const std::string name = current_case;
    std::thread([&] {
        current_case = name;
        work();
    }).join();
}

// One step, with all instruction sets and numbers of threads.
static void try_steps(uint64_t seed) {
    Case c(seed);
    c.make();
    const std::string name = "seed " + std::to_string(seed) + ", " + c.name();
    begin(name);
    const Expected expected = Reference(c).run();
    std::unique_ptr<Result> first;
    for (const Functions* functions : instruction_sets())
        for (int64_t num_threads : THREADS) {
            begin(name + ", " + functions->name + ", " + std::to_string(num_threads) + " threads");
            // A new caller has buffers of its own, as small as can be.
            in_new_thread([&] {
                Step step(c, *functions, num_threads);
                Call checks = step.call;  // without a place for values, ids are checked and that is all
                checks.values = nullptr, checks.rows = nullptr;
                EXPECT(functions->forward(checks) == DONE, "a check refused");
                EXPECT(step.forward() == DONE, "forward refused");
                step.backward();
                if (!first) {
                    compare(c, step.r, expected);
                    first.reset(new Result(std::move(step.r)));
                } else {
                    expect_same(c, step.r, *first, expected);
                }
            });
        }
}

// Sparse rows, looked up and no more.
static void try_sparse_rows(uint64_t seed) {
    Case c(seed);
    c.make_sparse();
    const std::string name = "seed " + std::to_string(seed) + ", sparse rows, " + c.name();
    begin(name);
    const Expected expected = Reference(c).run();
    std::unique_ptr<Result> first;
    for (const Functions* functions : instruction_sets())
        for (int64_t num_threads : THREADS) {
            begin(name + ", " + functions->name + ", " + std::to_string(num_threads) + " threads");
            in_new_thread([&] {
                Step step(c, *functions, num_threads);
                if (num_threads == 2) step.call.rows = nullptr;  // as calls are that no backward follows
                EXPECT(step.forward() == DONE, "forward refused");
                if (!c.unordered) compare_values(c, step.r, expected);
                if (!first) first.reset(new Result(std::move(step.r)));
                else EXPECT(step.r.values == first->values, "values have other bits than with one thread of the first instruction set");
            });
        }
}

// What is refused is refused, and leaves everything as it was.
static void try_refusals(uint64_t seed) {
    Case c(seed);
    c.make();
    begin("seed " + std::to_string(seed) + ", refusals, " + c.name());
    for (const Functions* functions : instruction_sets())
        for (int64_t num_threads : THREADS) {
            auto unchanged = [&](const Step& step) {
                for (std::size_t w = 0; w < c.widths.size(); ++w) EXPECT(step.r.weights[w] == c.weights[w], "a refused call changed a weight");
            };
            for (const Lookup& lookup : c.lookups) {
                if (lookup.policy != REFUSE) continue;
                const int64_t f = lookup.column;
                const int64_t first = c.jagged ? c.offsets[f * c.batch] : f, stride = c.jagged ? 1 : c.num_features;
                const int64_t count = c.jagged ? c.offsets[(f + 1) * c.batch] - first : c.batch;
                if (!count) continue;
                const Memory kept = c.id_memory;
                const int64_t at = first + stride * c.random.below(count);
                if (c.narrow_ids)
                    c.id_memory.as<int32_t>()[at] = c.random.one_of<int32_t>({-1, INT32_MIN, lookup.size <= INT32_MAX ? static_cast<int32_t>(lookup.size) : -1});
                else
                    c.id_memory.as<int64_t>()[at] = c.random.one_of<int64_t>({-1, INT64_MIN, INT64_MAX, lookup.size});
                Step step(c, *functions, num_threads);
                const Memory refused(2, 8);
                if (c.random.chance(2)) step.call.refused = refused.as<int64_t>();
                EXPECT(step.forward() == REFUSED_ID, "an id out of range was taken");
                unchanged(step);
                if (step.call.refused) {
                    const int64_t l = step.call.refused[0], id = step.call.refused[1];
                    const int64_t wrong = c.narrow_ids ? c.id_memory.as<int32_t>()[at] : c.id_memory.as<int64_t>()[at];
                    EXPECT(l >= 0 && l < static_cast<int64_t>(c.lookups.size()) && c.lookups[l].column == f && c.lookups[l].policy == REFUSE && id == wrong,
                           "lookup " + std::to_string(l) + " and id " + std::to_string(id) + " were named as refused, not " + std::to_string(wrong));
                }
                c.id_memory = kept;
            }
            if (!c.jagged) continue;
            const int64_t last = c.num_features * c.batch;
            for (int64_t wrong : {int64_t{-1}, INT64_MIN, INT64_MAX, c.num_ids + 1}) {
                const Memory kept = c.offset_memory;
                c.offset_memory.as<int64_t>()[c.random.below(last + 1)] = wrong;
                Step step(c, *functions, num_threads);
                EXPECT(step.forward() == BAD_OFFSETS, "offsets with " + std::to_string(wrong) + " were taken");
                unchanged(step);
                c.offset_memory = kept;
            }
        }
}

// Wherever memory runs out, the call says so, and the next one works.
static void try_without_memory(uint64_t seed) {
    Case c(seed);
    c.make();
    const std::string name = "seed " + std::to_string(seed) + ", " + c.name();
    begin(name);
    const Expected expected = Reference(c).run();
    for (const Functions* functions : instruction_sets())
        for (int64_t num_threads : {1, 3})
            for (int64_t allocation = 0;; ++allocation) {
                begin(name + ", " + functions->name + ", " + std::to_string(num_threads) + " threads, without allocation " + std::to_string(allocation));
                bool ran_out = false;
                in_new_thread([&] {
                    {
                        Step step(c, *functions, num_threads);
                        EXPECT(step.forward() == DONE, "forward refused");
                        allocations_left = allocation;
                        try {
                            step.backward();
                        } catch (const std::bad_alloc&) {
                            ran_out = true;
                        }
                        allocations_left = -1;
                    }
                    Step step(c, *functions, num_threads);
                    allocations_left = allocation;
                    try {
                        step.forward();
                    } catch (const std::bad_alloc&) {
                        ran_out = true;
                    }
                    allocations_left = -1;
                    EXPECT(step.forward() == DONE, "forward refused");
                    step.backward();
                    compare(c, step.r, expected);
                });
                if (!ran_out) break;
            }
}

// Single weights: gather and update.
static void try_single_weights(uint64_t seed) {
    Case c(seed);
    c.make_single();
    const std::string name = "seed " + std::to_string(seed) + ", a single weight, " + c.name();
    begin(name);
    const Expected expected = Reference(c).run();
    const int64_t width = c.widths[0], num_rows = c.rows[0];
    Memory rows(c.num_ids, 8);
    if (c.num_ids) std::memcpy(rows.data(), c.ids.data(), static_cast<std::size_t>(c.num_ids * 8));
    std::unique_ptr<Result> first;
    for (const Functions* functions : instruction_sets())
        for (int64_t num_threads : THREADS) {
            begin(name + ", " + functions->name + ", " + std::to_string(num_threads) + " threads");
            in_new_thread([&] {
                Result r;
                r.values = Memory(c.num_values, bytes_of(c.dtype));
                r.weights = c.weights, r.states = c.states;
                Memory gathered(c.num_values, bytes_of(c.weight_type()));
                Gather gather{};
                gather.weight = c.weights[0].data(), gather.rows = rows.as<int64_t>(), gather.values = gathered.data();
                gather.row_bytes = width * bytes_of(c.weight_type()), gather.num_rows = num_rows, gather.num_ids = c.num_ids;
                gather.num_threads = num_threads;
                EXPECT(functions->gather(gather) == DONE, "gather refused");
                for (int64_t i = 0; i < c.num_values; ++i) encode(r.values.data(), i, c.dtype, decoded(gathered.data(), i, c.weight_type()));
                RowUpdate update{};
                update.weight = r.weights[0].data();
                for (int s = 0; s < STATES; ++s) update.states[s] = r.states[s].data();
                update.rows = rows.as<int64_t>(), update.gradient = c.gradient.data(), update.hyper = c.hyper.data();
                update.num_hyper = static_cast<int64_t>(c.hyper.size()), update.step = c.step, update.rule = c.whole_rule();
                update.dtype = c.dtype, update.state_dtype = c.state_dtype, update.width = width;
                update.num_rows = num_rows, update.num_ids = c.num_ids, update.num_threads = num_threads;
                update.format = c.halves ? BRAINS : PLAIN;
                functions->update(update);
                if (!first) {
                    compare(c, r, expected);
                    first.reset(new Result(std::move(r)));
                } else {
                    expect_same(c, r, *first, expected);
                }
                Memory wrong = rows;
                for (int64_t row : {int64_t{-1}, num_rows, INT64_MIN, INT64_MAX}) {
                    if (!c.num_ids) break;
                    wrong.as<int64_t>()[c.num_ids / 2] = row;
                    gather.rows = wrong.as<int64_t>();
                    gathered = Memory(c.num_values, bytes_of(c.weight_type())), gather.values = gathered.data();
                    EXPECT(functions->gather(gather) == NO_SUCH_ROW, "gather took row " + std::to_string(row));
                }
            });
        }
}

// Two callers at once: each trains tables of its own, and both look up in others.
static void try_two_callers(uint64_t seed) {
    Case shared(seed);
    shared.make();
    auto caller = [&](uint64_t own_seed) {
        for (uint64_t i = 0; i < 2; ++i) {
            Case c(own_seed + i);
            c.make();
            begin("seed " + std::to_string(own_seed + i) + ", one of two callers, " + c.name());
            const Expected expected = Reference(c).run();
            for (const Functions* functions : instruction_sets()) {
                Step step(c, *functions, 2);
                EXPECT(step.forward() == DONE, "forward refused");
                step.backward();
                compare(c, step.r, expected);
                Step other(shared, *functions, 2);
                std::vector<void*> weights = pointers(shared.weights), projections = pointers(shared.projection_weights);
                other.call.weights = weights.data(), other.call.projections = projections.data();
                EXPECT(other.forward() == DONE, "forward refused");
            }
        }
    };
    std::thread second(caller, seed + 1000003);
    caller(seed);
    second.join();
}

extern "C" {
int64_t embtables_version();
const char* embtables_instructions();
int embtables_forward(const Call*);
int embtables_backward(const Call*, const Call*);
int embtables_find_openmp();
void embtables_huge_pages(void*, int64_t);
}

// The functions that Python calls. Without memory they return so.
static void try_library(uint64_t seed) {
    Case c(seed);
    c.make();
    begin("seed " + std::to_string(seed) + ", the library, " + c.name());
    EXPECT(embtables_version() > 0 && *embtables_instructions(), "the library has no version");
    embtables_find_openmp();
    Memory large(3 << 20, 1, 5);
    for (int64_t bytes : {int64_t{0}, int64_t{1}, large.count()}) embtables_huge_pages(large.data(), bytes);
    const Expected expected = Reference(c).run();
    in_new_thread([&] {
        Step step(c, *instruction_sets()[0], 2);
        allocations_left = 0;
        const int forward = embtables_forward(&step.call);
        allocations_left = -1;
        EXPECT(forward == OUT_OF_MEMORY, "forward without memory gave " + std::to_string(forward));
        EXPECT(embtables_forward(&step.call) == DONE, "forward refused");
        if (c.rule >= DENSE_GRADIENT) return;
        step.call.values = c.gradient.data();
        allocations_left = 0;
        const int backward = embtables_backward(&step.call, &step.call);
        allocations_left = -1;
        EXPECT(backward == OUT_OF_MEMORY, "backward without memory gave " + std::to_string(backward));
        EXPECT(embtables_backward(&step.call, &step.call) == DONE, "backward failed");
        compare(c, step.r, expected);
    });
}

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: driver FIRST_SEED NUM_SEEDS, for example: driver 0 20\n");
        return 2;
    }
    name_failures();
    const uint64_t first = std::strtoull(argv[1], nullptr, 10), num = std::strtoull(argv[2], nullptr, 10);
    for (uint64_t seed = first; seed < first + num; ++seed) {
        try_steps(seed);
        try_single_weights(seed);
        try_sparse_rows(seed);
        if (seed % 4 == 0) {
            try_refusals(seed);
            try_two_callers(seed);
        }
        if (seed % 8 == 0) try_without_memory(seed);
        try_library(seed);
    }
    std::printf("%llu seeds passed\n", static_cast<unsigned long long>(num));
}
