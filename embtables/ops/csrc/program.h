// What a lookup is, as one int64 tensor that Python writes once (embtables/ops/program.py), and the arguments of a call.
#pragma once
#include <cstdint>

namespace embtables {

enum Kind : int64_t { ROW = 0, HASH = 1, DIGIT = 2, CUT = 3, BLOCK = 4, CODED = 5, LISTED = 6, BALANCED = 7, BALANCED_BLOCK = 8,
                      BITMAP = 9, COMPRESSED = 10, ENTRIES = 11 };
// LIST_SUM and LIST_MEAN are those of a LISTED piece, SPARSE of one of the last three kinds: these stand alone.
enum Operation : int64_t { CONCAT = 0, SUM = 1, MEAN = 2, MULT = 3, MIXED = 4, LIST_SUM = 5, LIST_MEAN = 6, SPARSE = 7 };
enum Policy : int64_t { ANY = -1, REFUSE = 0, FOLD = 1, OOV = 2 };
enum Pooling : int64_t { NONE = 0, POOL_SUM = 1, POOL_MEAN = 2 };
enum RuleKind : int64_t { SGD = 0, ROWWISE_ADAGRAD = 1, ADAGRAD = 2, ADAM = 3, DENSE_GRADIENT = 4, SPARSE_GRADIENT = 5 };
// Beside the number of a rule: it keeps a running mean of the weights, and one hyper-parameter more behind its own.
constexpr int64_t AVERAGED = 8;
// How many hyper-parameters of its own each rule has: eps; eps, beta1, beta2.
constexpr int64_t OWN_HYPER[] = {0, 1, 1, 3};
// How many tensors a weight or projection has for what a rule keeps of it: two of its own, two of AVERAGED.
constexpr int64_t STATES = 4;
enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A (table, feature) pair: an output; or what the ids of such a lookup are looked up by that none of its alternatives has,
// its rest. All fields of all structs are int64, so that they are rows of the tensor.
struct Lookup {
    int64_t column;      // of its feature among the input's columns
    int64_t size;        // ids of the table
    int64_t policy;      // what becomes of others
    int64_t fold_seed;
    int64_t padding;
    int64_t has_padding;
    int64_t dim;
    int64_t operation;
    int64_t first_piece;
    int64_t num_pieces;
    int64_t num_rows;    // addresses an id: one a piece, but one in all where pieces are alternatives (MIXED), or as
                         // many as the rest has; and as many as the longest list has of a LISTED piece
    int64_t code;        // remap from id to rank, or -1
    int64_t ranks_from;
    int64_t inner;       // scalars of the combination; without a projection zeros follow them up to dim (CONCAT)
    int64_t projection;  // from inner to dim, or -1 where those are the same; never with MIXED or blocks
    int64_t rest;        // MIXED: the number of the lookup of its rest, which reads no slab of a piece, or -1. It takes
                         // ranks less those of the pieces; its addresses stand where those of an alternative would.
    int64_t inner_projection;  // from inner to middle, from where the projection goes on to dim; or -1
    int64_t middle;
};

// Where a lookup reads: rows of one weight, or blocks of scalars (BLOCK, BALANCED_BLOCK), or rows of a sparse matrix
// (BITMAP, COMPRESSED, ENTRIES), whose values are rows of one scalar and are not trained.
struct Piece {
    int64_t kind;
    int64_t weight;
    int64_t base;        // first row (scalar) of its slab within the weight
    int64_t a;           // HASH, BLOCK: seed; BALANCED, BALANCED_BLOCK: start; DIGIT: divisor; CUT: greatest row;
                         // MIXED: the first rank beyond; CODED, LISTED: where in its code the ids of the table begin;
                         // of a sparse matrix: its row where the table begins
    int64_t b;           // DIGIT: radix; HASH, CODED, LISTED, BALANCED and blocks: rows (scalars) of the slab
    int64_t width;       // scalars it contributes: of a sparse matrix its columns
    int64_t column;      // where they go in the vector (CONCAT)
    int64_t has_sign;
    int64_t sign_seed;
    int64_t projection;  // MIXED: to the lookup's dim, or -1
    int64_t code;        // CODED: rows of the slab; LISTED: where lists begin, and where the last one ends; BITMAP: of int64, a
                         // bit for each entry of the matrix; COMPRESSED, ENTRIES: the column of each value; else -1
    int64_t values;      // LISTED: the lists, of rows of the slab; BITMAP: how many bits are set before each 8 words;
                         // COMPRESSED: where the values of each row begin, and where the last one ends; ENTRIES: the row
                         // of each value, rising; else -1
    int64_t slab, rows;  // first row of the slab within the weight, and how many it has: of a sparse matrix, its values
    int64_t unit;        // of a weight in a format: where the slab's units begin,
    int64_t block;       // and its scales
    int64_t turn;        // BALANCED, BALANCED_BLOCK: how much of the slab each turn begins beyond the one before

    bool is_block() const { return kind == BLOCK || kind == BALANCED_BLOCK; }
};

// How the rows of a weight are stored: as scalars of the call's type, or (embtables/formats) as integers times a scale, as
// sums of signs, in float16 or in bfloat16.
enum Format : int64_t { PLAIN = 0, INTEGERS = 1, SIGNS = 2, HALVES = 3, BRAINS = 4 };

struct Weight {
    int64_t width;
    int64_t start;       // rows of all weights before: addresses count through all weights
    int64_t format;
    int64_t bits;        // of a scalar, where it is not plain
    int64_t share;       // how many rows of a slab have their scales in common; 0: all of them
    int64_t unit_bytes;  // where it is not plain: of a row (of rows of one scalar: of some of them), scales behind it too

    // Where it is not plain: the bytes of a row's scalars, how many scales belong together, and whether they stand there.
    int64_t scalar_bytes() const { return (bits * width + 7) / 8; }
    int64_t num_scales() const { return format == SIGNS ? bits : 1; }
    bool scales_in_rows() const { return unit_bytes > scalar_bytes(); }
};

struct Projection {
    int64_t width;
    int64_t dim;
    int64_t trained;     // whether steps change it, or ask for its gradient
};

// A buffer of integers: uint8, int16, int32 or int64 by their bytes.
//
// Whoever writes a program sees to it that a code has an entry for every id. What it holds is checked with every read,
// since files may be damaged: a rank that is none is rank 0, a row that its slab does not have is the slab's row 0, and
// of a list there is no more than lies within its values; of a sparse row no value that is none, or has no column.
struct Code {
    int64_t bytes;
    int64_t columns;     // integers an entry
    int64_t length;      // integers in all
};

// What stands for the address of a padding id, and behind the end of a list or the one address of an alternative.
constexpr int64_t PADDING = -1, NOTHING = -2;

struct Program {
    int64_t num_features, num_lookups, num_pieces, num_weights, num_projections, num_codes, num_rests;
    int64_t rows_per_example, total_rows;
    const Lookup* lookups;          // those with outputs, and the rests behind them
    const Piece* pieces;
    const Weight* weights;          // num_weights + 1; the last one ends the rows
    const Projection* projections;
    const Code* codes;

    explicit Program(const int64_t* words) {
        num_features = words[0];
        num_lookups = words[1];
        num_pieces = words[2];
        num_weights = words[3];
        num_projections = words[4];
        num_codes = words[5];
        num_rests = words[6];
        const int64_t* next = words + 7;
        lookups = reinterpret_cast<const Lookup*>(next);
        next += (num_lookups + num_rests) * (sizeof(Lookup) / 8);
        pieces = reinterpret_cast<const Piece*>(next);
        next += num_pieces * (sizeof(Piece) / 8);
        weights = reinterpret_cast<const Weight*>(next);
        next += (num_weights + 1) * (sizeof(Weight) / 8);
        projections = reinterpret_cast<const Projection*>(next);
        next += num_projections * (sizeof(Projection) / 8);
        codes = reinterpret_cast<const Code*>(next);
        rows_per_example = 0;
        for (int64_t l = 0; l < num_lookups; ++l) rows_per_example += lookups[l].num_rows;
        total_rows = weights[num_weights].start;
    }
};

// Where a lookup's output lies, counted in elements: bag b at start + b * stride; of NONE, id i at start + i * stride.
struct Output {
    int64_t start, stride, pooling;
};

struct Call {
    const int64_t* program;
    const void* ids;             // int32 or int64, [batch, num_features], or flat with offsets
    int64_t id_bytes;
    const int64_t* offsets;      // [num_features * batch + 1], or null
    int64_t num_ids;
    const float* id_weights;     // of the shape of ids, or null
    int64_t batch;
    void* const* weights;
    void* const* projections;
    const void* const* codes;
    const Output* outputs;
    void* values;                // forward: the output; backward: its gradient
    int64_t* rows;               // addresses: written forward, read backward; null where no backward follows
    int64_t dtype;
    int64_t state_dtype;
    int64_t num_threads;
    // backward only
    int64_t rule;
    const double* hyper;         // lr, l2, the rule's own and, where there is one more, the norm to clip at
    int64_t num_hyper;
    int64_t step;
    void* const* states;              // STATES a weight, null where the rule has none
    void* const* projection_states;   // as many a projection, null where it is not trained
    int64_t* const* gradient_rows;    // SPARSE_GRADIENT: the distinct rows of each weight; `weights` takes their values
    int64_t* num_gradient_rows;
    void* saved;                      // what keep_rows wrote: the rows as they were, where a gradient depends on them
    int64_t* refused;                 // forward: lookup and id of one that is refused; null: nobody asks
    const void* const* scales;        // of each weight in bfloat16, where it has any that stand outside of its rows
    const float* const* strengths;    // of each weight, with which L2 pulls each of its rows that is updated; or null
};

// Rows of one weight, each to its place in `values`.
struct Gather {
    const void* weight;
    const int64_t* rows;  // [num_ids]
    void* values;
    int64_t row_bytes;
    int64_t num_rows;
    int64_t num_ids;
    int64_t num_threads;
};

// One step of the optimizer on rows of one weight, given the gradient [num_ids, width] of each occurrence. `format`: PLAIN,
// when the weight is of the gradient's type; or BRAINS, of a weight that is trained in bfloat16 by gradients in float32.
struct RowUpdate {
    void* weight;
    void* states[STATES];
    const int64_t* rows;
    const void* gradient;
    const double* hyper;
    int64_t num_hyper, step, rule, dtype, state_dtype, width, num_rows, num_ids, num_threads, format;
};

// What a function returns.
enum Outcome : int { DONE = 0, REFUSED_ID = 1, BAD_OFFSETS = 2, NO_SUCH_ROW = 3, OUT_OF_MEMORY = 4 };

// The kernels of one instruction set; OUT_OF_MEMORY is thrown as std::bad_alloc.
struct Functions {
    const char* name;
    Outcome (*forward)(const Call&);
    void (*backward)(const Call&, const Call&);
    int64_t (*keep_rows)(const Call&);
    Outcome (*gather)(const Gather&);
    Outcome (*update)(const RowUpdate&);
};

}  // namespace embtables
