// The kernels. Compiled once for each instruction set (baseline.cpp, avx2.cpp, avx512.cpp), in a namespace of its own.
//
// Every sum has one order, whatever the threads: an output's ids in order, a row's occurrences in order, and a row is
// updated by one thread. No fused multiply-add is generated (-ffp-contract=off), so instruction sets agree too.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "program.h"
#include "threads.h"

namespace embtables {
namespace EMBTABLES_INSTRUCTIONS {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline void store(float* p, float value) { *p = value; }

inline float load(const bfloat16* p) {
    uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(bfloat16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        p->bits = 0x7fc0;
        return;
    }
    p->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

inline float load(const float16* p) {
    const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000) << 16, exponent = (p->bits >> 10) & 31, low = p->bits & 1023;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(low) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | (low << 13);
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        p->bits = 0x7e00;
    } else if (bits >= 0x477ff000) {
        p->bits = sign | 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds to a multiple of 2**-24, ties to even
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        p->bits = sign | static_cast<uint16_t>(bits - 0x3f000000);
    } else {
        p->bits = sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
    }
}

template <int W>
inline int64_t fixed(int64_t width) {
    return W > 0 ? W : width;
}

#include "vectors.h"
#include "stored.h"

// ---- addresses -----------------------------------------------------------------------------------------------------

inline uint64_t mix(uint64_t x) {  // splitmix64, as embtables.hashing.mix
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

#include "rounding.h"

inline int64_t hash_small(int64_t id, int64_t seed, uint64_t size) {  // size below 2**32
    const uint64_t h = mix(static_cast<uint64_t>(id ^ seed));
    return static_cast<int64_t>(((h >> 33) * size + ((((h >> 2) & 0x7fffffff) * size) >> 31)) >> 31);
}

inline int64_t hash_id(int64_t id, int64_t seed, int64_t size) {
    if (size < (int64_t{1} << 32)) return hash_small(id, seed, static_cast<uint64_t>(size));
    return static_cast<int64_t>((mix(static_cast<uint64_t>(id ^ seed)) >> 2) % static_cast<uint64_t>(size));
}

inline float hash_sign(int64_t id, int64_t seed) {
    return ((mix(static_cast<uint64_t>(id ^ seed)) >> 62) & 1) ? 1.0f : -1.0f;
}

// The rows of n ids, all of them from 0 to end − 1, as embtables.hashing.balanced_ids.
inline void balanced(const Piece& piece, int64_t end, const int64_t* x, int64_t n, int64_t base, int64_t* __restrict rows) {
    const int64_t size = piece.b, scalars = piece.kind == BALANCED ? 1 : piece.width, in_turn = size / scalars;
    const uint64_t start = static_cast<uint64_t>(piece.a), turn = static_cast<uint64_t>(piece.turn);
    auto row = [=](int64_t place, int64_t displaced) {
        const int64_t at = place * scalars + displaced;
        return base + (at < size ? at : at - size);
    };
    auto few = [=](uint64_t fraction) { return static_cast<int64_t>((fraction >> 32) * static_cast<uint64_t>(size) >> 32); };
    if (end <= INT32_MAX && size <= INT32_MAX) {
        // By its reciprocal, a quotient of such numbers is right or one too small.
        const uint64_t reciprocal = UINT32_MAX / static_cast<uint64_t>(in_turn);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t least = static_cast<int64_t>(static_cast<uint64_t>(x[i]) * reciprocal >> 32), left = x[i] - least * in_turn;
            const int64_t more = left >= in_turn;
            rows[i] = row(left - (more ? in_turn : 0), few(static_cast<uint64_t>(least + more) * turn + start));
        }
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        const int64_t number = x[i] / in_turn;
        const uint64_t fraction = static_cast<uint64_t>(number) * turn + start;
        const int64_t many = static_cast<int64_t>((fraction >> 2) % static_cast<uint64_t>(size));
        rows[i] = row(x[i] - number * in_turn, size <= INT32_MAX ? few(fraction) : many);
    }
}

// Of so many bags, or examples, one lookup after another is worked on, some ids at a time: while the vectors of some are
// written, rows of the next ones are on their way. The first rows of each are asked for in one burst, which processors
// wait for: the more ids, the fewer bursts.
constexpr int64_t BLOCK_OF_BAGS = 256, BLOCK_OF_IDS = 512;
// How many ids ahead of their use rows are asked for: of many at once fewer would arrive in time.
constexpr int64_t READ_AHEAD = 24;

inline bool is_list(const Lookup& lookup) { return lookup.operation == LIST_SUM || lookup.operation == LIST_MEAN; }

inline int64_t id_at(const Call& call, int64_t place) {
    return call.id_bytes == 4 ? static_cast<const int32_t*>(call.ids)[place] : static_cast<const int64_t*>(call.ids)[place];
}

// An id as its table takes it, where it is not refused.
inline int64_t taken(const Lookup& lookup, int64_t id) {
    if (lookup.policy == ANY || static_cast<uint64_t>(id) < static_cast<uint64_t>(lookup.size)) return id;
    if (lookup.policy == OOV) return lookup.size;
    const int64_t folded = hash_id(id, lookup.fold_seed, lookup.size);
    // An id that means something must not become one that means nothing.
    return lookup.has_padding && folded == lookup.padding ? (folded + 1) % lookup.size : folded;
}

// n ids from `first` on, as their table takes them; false where one is refused.
inline bool in_range(const Call& call, const Lookup& lookup, int64_t first, int64_t stride, int64_t n, int64_t* __restrict x) {
    // Its first bit is set by a number that is not among 0 … size − 1: processors see to several at a time.
    uint64_t outside = 0;
    const uint64_t most = static_cast<uint64_t>(lookup.size) - 1;
    auto take_all = [&](auto* ids, auto step) {
        for (int64_t i = 0; i < n; ++i) {
            x[i] = ids[i * step];
            outside |= static_cast<uint64_t>(x[i]) | (most - static_cast<uint64_t>(x[i]));
        }
    };
    auto take = [&](auto* ids) {
        if (stride == 1) take_all(ids + first, std::integral_constant<int64_t, 1>{});
        else take_all(ids + first, stride);
    };
    if (call.id_bytes == 4) take(static_cast<const int32_t*>(call.ids));
    else take(static_cast<const int64_t*>(call.ids));
    if (lookup.policy == ANY || outside >> 63 == 0) return true;
    if (lookup.policy == REFUSE) return false;
    for (int64_t i = 0; i < n; ++i) x[i] = taken(lookup, x[i]);
    return true;
}

// Calls f with the integers of a code.
template <class F>
inline void with_code(const Program& program, const Call& call, int64_t code, const F& f) {
    const void* codes = call.codes[code];
    switch (program.codes[code].bytes) {
        case 1: return f(static_cast<const uint8_t*>(codes));
        case 2: return f(static_cast<const int16_t*>(codes));
        case 4: return f(static_cast<const int32_t*>(codes));
        default: return f(static_cast<const int64_t*>(codes));
    }
}

// A row that a code names: never one beside the slab.
inline int64_t row_within(const Piece& piece, int64_t row) {
    return static_cast<uint64_t>(row) < static_cast<uint64_t>(piece.b) ? row : 0;
}

// Asks for the row where an alternative of an id begins, or a block of scalars.
template <class T>
inline void ask_from(const Program& program, const Call& call, int64_t weight, int64_t row, int64_t scalars) {
    const Weight& w = program.weights[weight];
    const int64_t scalar = w.format == PLAIN ? 8 * static_cast<int64_t>(sizeof(T)) : w.bits;
    const int64_t bits = w.format != PLAIN && w.width > 1 ? 8 * w.unit_bytes : scalar * w.width;
    ask_for<0>(static_cast<const char*>(call.weights[weight]) + (row - w.start) * bits / 8, (scalar * scalars + 7) / 8);
}

// Asks for the rows of a piece that n ids have, each no more than `most` before the first that is none.
template <class T>
__attribute__((noinline)) void ask_all(const Program& program, const Call& call, const Piece& piece, const int64_t* rows,
                                       int64_t stride, int64_t n, int64_t most) {
    with_rows<T, 0>(program, call, piece, [&](const auto& stored) {
        for (int64_t i = 0; i < n; ++i, rows += stride)
            for (int64_t c = 0; c < most && rows[c] >= 0; ++c) stored.ask(rows[c]);
    });
}

// The rows of the lists of n ids, each followed by NOTHING up to the longest.
template <class T>
inline void address_lists(const Program& program, const Call& call, const Lookup& lookup, const int64_t* x,
                          const int64_t* ids, int64_t n, int64_t* rows, int64_t stride) {
    const Piece& piece = program.pieces[lookup.first_piece];
    const int64_t base = program.weights[piece.weight].start + piece.base, length = program.codes[piece.values].length;
    int64_t begin[BLOCK_OF_IDS], count[BLOCK_OF_IDS];
    with_code(program, call, piece.code, [&](auto* offsets) {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t place = piece.a + x[i];
            const int64_t from = offsets[place], to = std::min<int64_t>(offsets[place + 1], length);
            begin[i] = from;
            count[i] = from < 0 || from >= to ? 0 : std::min(to - from, lookup.num_rows);
        }
    });
    with_code(program, call, piece.values, [&](auto* values) {
        for (int64_t i = 0; i < n; ++i) {
            int64_t* own = rows + i * stride;
            const bool pads = lookup.has_padding && ids[i] == lookup.padding;
            const int64_t there = pads ? 0 : count[i];
            for (int64_t c = 0; c < there; ++c) own[c] = base + row_within(piece, values[begin[i] + c]);
            for (int64_t c = there; c < lookup.num_rows; ++c) own[c] = pads ? PADDING : NOTHING;
        }
    });
    ask_all<T>(program, call, piece, rows, stride, n, lookup.num_rows);
}

// The rows of a piece that n ids have, in `found`: `x` are the ids, or their ranks.
inline void rows_of_piece(const Program& program, const Call& call, const Lookup& lookup, const Piece& piece, const int64_t* x,
                          int64_t n, int64_t* __restrict found) {
    const int64_t base = program.weights[piece.weight].start + piece.base;
    switch (piece.kind) {
        case HASH:
        case BLOCK:
            if (piece.b < (int64_t{1} << 32)) {
                for (int64_t i = 0; i < n; ++i) found[i] = base + hash_small(x[i], piece.a, static_cast<uint64_t>(piece.b));
            } else {
                for (int64_t i = 0; i < n; ++i) found[i] = base + hash_id(x[i], piece.a, piece.b);
            }
            break;
        case BALANCED:
        case BALANCED_BLOCK:
            balanced(piece, lookup.size + (lookup.policy == OOV), x, n, base, found);
            break;
        case DIGIT:
            for (int64_t i = 0; i < n; ++i) {
                const int64_t divisor = piece.a, radix = piece.b;
                int64_t q;
                if (static_cast<uint64_t>(x[i] | divisor | radix) >> 32) {
                    q = (x[i] / divisor - (x[i] % divisor < 0)) % radix;  // raw ids may be negative: rounded down
                    q += q < 0 ? radix : 0;
                } else {  // 32-bit division is several times faster
                    const uint32_t small = static_cast<uint32_t>(x[i]) / static_cast<uint32_t>(divisor);
                    q = small < radix ? small : small % static_cast<uint32_t>(radix);
                }
                found[i] = base + q;
            }
            break;
        case CUT:
            for (int64_t i = 0; i < n; ++i) found[i] = base + (x[i] < piece.a ? x[i] : piece.a);
            break;
        case CODED: {
            const int64_t columns = program.codes[piece.code].columns;
            with_code(program, call, piece.code, [&](auto* codes) {
                for (int64_t i = 0; i < n; ++i) found[i] = base + row_within(piece, codes[piece.a + x[i] * columns]);
            });
            break;
        }
        default:
            for (int64_t i = 0; i < n; ++i) found[i] = base + x[i];
    }
}

// Whether every id has one row of one weight and takes it as it is.
inline bool is_one_row(const Program& program, const Lookup& lookup) {
    const Piece& first = program.pieces[lookup.first_piece];
    if (lookup.operation == CONCAT)
        return lookup.num_pieces == 1 && lookup.inner == lookup.dim && lookup.projection < 0 && !first.is_block();
    if (lookup.operation != MIXED || program.weights[first.weight].format != PLAIN) return false;
    for (int64_t c = 0; c < lookup.num_pieces; ++c) {
        const Piece& piece = program.pieces[lookup.first_piece + c];
        if (piece.weight != first.weight || piece.projection >= 0) return false;
    }
    if (lookup.rest < 0) return true;
    const Lookup& rest = program.lookups[lookup.rest];
    return rest.num_pieces == 1 && program.pieces[rest.first_piece].weight == first.weight && is_one_row(program, rest);
}

// The addresses of n ids piece by piece: `x` are the ids, or their ranks, and those of id i begin `places[i]` strides behind
// `rows`, or i strides. The rows of the first ids are asked for, `ahead` of each piece.
template <class T>
inline void address_pieces(const Program& program, const Call& call, const Lookup& lookup, const int64_t* x, const int64_t* ids,
                           int64_t n, int64_t ahead, int64_t* rows, int64_t stride, const int64_t* places) {
    const Piece* pieces = program.pieces + lookup.first_piece;
    int64_t room[BLOCK_OF_IDS];
    int64_t* found = stride == 1 && !places ? rows : room;
    for (int64_t c = 0; c < lookup.num_rows; ++c) {
        const Piece& piece = pieces[c];
        rows_of_piece(program, call, lookup, piece, x, n, found);
        if (piece.is_block()) {
            for (int64_t i = 0; i < n; ++i) ask_from<T>(program, call, piece.weight, found[i], piece.width);
        } else {
            ask_all<T>(program, call, piece, found, 1, std::min(n, ahead), 1);
        }
        if (lookup.has_padding)
            for (int64_t i = 0; i < n; ++i) found[i] = ids[i] == lookup.padding ? PADDING : found[i];
        if (places)
            for (int64_t i = 0; i < n; ++i) rows[places[i] * stride + c] = found[i];
        else if (found != rows)
            for (int64_t i = 0; i < n; ++i) rows[i * stride + c] = found[i];
    }
}

// The same of alternatives, and of the rest of the ids.
template <class T>
void address_alternatives(const Program& program, const Call& call, const Lookup& lookup, const int64_t* x,
                          const int64_t* ids, int64_t n, int64_t ahead, int64_t* rows, int64_t stride) {
    const Piece* pieces = program.pieces + lookup.first_piece;
    const int64_t held = pieces[lookup.num_pieces - 1].a;
    int64_t found[BLOCK_OF_IDS], number[BLOCK_OF_IDS];  // row, and which alternative; of ids of the rest those of rank 0
    // Alternative by alternative, as many ids at a time as fit into a vector: which of them an id has cannot be foreseen.
    const auto offset = [&](int64_t k) { return program.weights[pieces[k].weight].start + pieces[k].base; };
    for (int64_t i = 0; i < n; ++i) found[i] = (x[i] < held ? x[i] : 0) + offset(0), number[i] = 0;
    for (int64_t k = 0; k + 1 < lookup.num_pieces; ++k) {
        const int64_t end = pieces[k].a, further = offset(k + 1) - offset(k);
        for (int64_t i = 0; i < n; ++i) {
            const bool beyond = x[i] >= end && x[i] < held;
            found[i] += beyond ? further : 0, number[i] += beyond;
        }
    }
    for (int64_t i = 0; i < std::min(n, ahead); ++i) ask_from<T>(program, call, pieces[number[i]].weight, found[i], 1);
    for (int64_t i = 0; i < n; ++i) {
        const bool pads = lookup.has_padding && ids[i] == lookup.padding;
        rows[i * stride] = pads ? PADDING : x[i] < held ? found[i] : NOTHING;
        for (int64_t c = 1; c < lookup.num_rows; ++c) rows[i * stride + c] = pads ? PADDING : NOTHING;
    }
    if (lookup.rest < 0) return;
    int64_t beyond[BLOCK_OF_IDS], places[BLOCK_OF_IDS], own_ids[BLOCK_OF_IDS], count = 0;
    for (int64_t i = 0; i < n; ++i) {
        beyond[count] = x[i] - held, places[count] = i, own_ids[count] = ids[i];
        count += x[i] >= held;
    }
    address_pieces<T>(program, call, program.lookups[lookup.rest], beyond, own_ids, count, ahead, rows, stride, places);
}

#include "sparse.h"

// The addresses of up to BLOCK_OF_IDS ids, as their table takes them; `rows` has n * num_rows of them, `stride` from id to
// id. Their rows are asked for: all, or the first ones of ids that have one each.
template <class T>
inline void address(const Program& program, const Call& call, const Lookup& lookup, const int64_t* ids, int64_t n,
                    int64_t* rows, int64_t stride) {
    const int64_t* x = ids;
    int64_t ranked[BLOCK_OF_IDS];
    if (lookup.code >= 0) {
        const uint64_t end = static_cast<uint64_t>(lookup.size + (lookup.policy == OOV));
        x = ranked;
        with_code(program, call, lookup.code, [&](auto* ranks) {
            ranks += lookup.ranks_from;
            for (int64_t i = 0; i < n; ++i) {
                const int64_t rank = ranks[ids[i]];
                // Damaged ranks must not lead out of the weights.
                ranked[i] = static_cast<uint64_t>(rank) < end ? rank : 0;
            }
        });
    }
    if (lookup.operation == SPARSE) return address_sparse<T>(program, call, lookup, ids, n, rows, stride);
    if (is_list(lookup)) return address_lists<T>(program, call, lookup, x, ids, n, rows, stride);
    const int64_t ahead = is_one_row(program, lookup) ? READ_AHEAD : n;
    if (lookup.operation == MIXED) return address_alternatives<T>(program, call, lookup, x, ids, n, ahead, rows, stride);
    address_pieces<T>(program, call, lookup, x, ids, n, ahead, rows, stride, nullptr);
}

// Calls f with the dimension as a constant where it is a common one: loops over it are then a few vector instructions.
template <class T, class F>
inline void with_dim(int64_t dim, const F& f) {
    if constexpr (!std::is_same<T, float>::value) return f(std::integral_constant<int, 0>{});
    switch (dim) {
        case 4: return f(std::integral_constant<int, 4>{});
        case 8: return f(std::integral_constant<int, 8>{});
        case 16: return f(std::integral_constant<int, 16>{});
        case 32: return f(std::integral_constant<int, 32>{});
        case 64: return f(std::integral_constant<int, 64>{});
        case 128: return f(std::integral_constant<int, 128>{});
        default: return f(std::integral_constant<int, 0>{});
    }
}

// The same for floats of more dimensions: of those that have no constant, up to eight registers, f is given what
// lanes_of takes for them.
template <class T, class F>
inline void with_any_dim(int64_t dim, const F& f) {
    constexpr int most = std::is_same<T, float>::value ? 8 * REGISTER : 0;
    const bool common = (dim & (dim - 1)) == 0 && dim <= 128;
    if (common || dim < 5 || dim > most) return with_dim<T>(dim, f);
    if (dim < REGISTER && dim < 8) return f(std::integral_constant<int, -8>{});
    if (dim < REGISTER) return f(std::integral_constant<int, -16>{});
    each_of<REGISTER>(std::make_integer_sequence<int, 8>{}, [&](auto before, auto) {
        if constexpr (before >= REGISTER)
            if (before < dim && dim <= before + REGISTER) f(std::integral_constant<int, -(before + REGISTER)>{});
    });
}

// ---- vectors -------------------------------------------------------------------------------------------------------

template <class T>
inline const T* row_of(const Program& program, const Call& call, int64_t weight, int64_t row) {
    const Weight& w = program.weights[weight];
    return static_cast<const T*>(call.weights[weight]) + (row - w.start) * w.width;
}

// Unpacks a row that is not plain.
__attribute__((noinline)) inline void unpack(const Program& program, const Call& call, const Piece& piece, int64_t row,
                                             float* room) {
    const int64_t stored_width = program.weights[piece.weight].width;
    with_dim<float>(has_own_code(stored_width) ? stored_width : 0, [&](auto width) {
        with_rows<float, width>(program, call, piece, [&](const auto& stored) {
            stored.read(row, [&](auto d, auto n, auto v) { put<n>(room + d, v); });
        });
    });
}

// A row of any format: where it is not plain, it is unpacked to `room`. Weights of other types are all plain.
template <class T>
inline const T* row_in(const Program& program, const Call& call, const Piece& piece, int64_t row, float* room) {
    if constexpr (std::is_same<T, float>::value) {
        if (program.weights[piece.weight].format != PLAIN) return unpack(program, call, piece, row, room), room;
    }
    return row_of<T>(program, call, piece.weight, row);
}

// A scalar of a slab of width 1 that is not plain, counted from the slab's first.
inline float scalar_of(const Program& program, const Call& call, const Piece& piece, int64_t number) {
    float value = 0;
    const int64_t row = program.weights[piece.weight].start + piece.slab + number;
    with_rows<float, 1>(program, call, piece, [&](const auto& stored) {
        stored.read(row, [&](auto, auto, auto v) { value = v; });
    });
    return value;
}

// Neighboring rows, counted through all weights.
struct Span {
    int64_t first, last;
    bool holds(int64_t row) const { return first <= row && row < last; }
};
inline Span rows_of_slab(const Program& program, const Piece& piece) {
    const int64_t first = program.weights[piece.weight].start + piece.slab;
    return {first, first + piece.rows};
}

// What an id is looked up by that has this first address: the lookup itself, or its rest.
inline const Lookup& looked_up_by(const Program& program, const Lookup& lookup, int64_t row) {
    if (lookup.rest < 0) return lookup;
    for (int64_t c = 0; c < lookup.num_pieces; ++c)
        if (rows_of_slab(program, program.pieces[lookup.first_piece + c]).holds(row)) return lookup;
    return program.lookups[lookup.rest];
}

// What says where the addresses of an id belong, in all but the one address of an alternative.
inline const Lookup& with_addresses(const Program& program, const Lookup& lookup) {
    return lookup.rest < 0 || program.lookups[lookup.rest].num_rows == 0 ? lookup : program.lookups[lookup.rest];
}

// MIXED: the width and the projection of an address, which follow from its weight.
inline const Piece& alternative_of(const Program& program, const Lookup& lookup, int64_t row) {
    int64_t w = 0;
    for (int64_t k = 1; k < program.num_weights; ++k) w += row >= program.weights[k].start;
    const Piece* piece = program.pieces + lookup.first_piece;
    while (piece->weight != w) ++piece;
    // Scales are those of the row's slab, of which a weight may have several.
    const int64_t within = row - program.weights[w].start;
    if (program.weights[w].format != PLAIN)
        while (piece->weight != w || within < piece->slab || within >= piece->slab + piece->rows) ++piece;
    return *piece;
}

// Where the gradient of row c of an id lies among the id's own values, and where keep_rows puts the row.
inline int64_t own_column(const Program& program, const Lookup& lookup, int64_t c) {
    return lookup.operation == CONCAT ? program.pieces[lookup.first_piece + c].column : c * lookup.inner;
}

// v [dim] = row [width] · projection.
template <class T, int D, class Row>
inline void project_one(const T* projection, const Row* row, int64_t width, int64_t dim, float* __restrict v) {
    each<D>(dim, [&](int64_t d, auto n) {
        auto sum = load(row) * get<n>(projection + d);
        for (int64_t j = 1; j < width; ++j) sum += load(row + j) * get<n>(projection + j * dim + d);
        put<n>(v + d, sum);
    });
}

// The rows of an id's list come before NOTHING.
inline int64_t list_length(const Lookup& lookup, const int64_t* rows) {
    int64_t count = 0;
    while (count < lookup.num_rows && rows[count] >= 0) ++count;
    return count;
}

// The values at an id's addresses, of which there is at least one, combined: v [inner]. `id` is what signs are hashed
// from; `saved`: the rows, from keep_rows, where the weights have others by now.
template <class T, int D>
__attribute__((always_inline)) inline void combine(const Program& program, const Call& call, const Lookup& lookup,
                                                   const int64_t* rows, int64_t id, const T* saved, float* __restrict v,
                                                   float* room) {
    const int64_t dim = fixed<D>(lookup.inner);
    const Piece* pieces = program.pieces + lookup.first_piece;
    auto row_at = [&](const Piece& piece, int64_t c) {
        return saved ? saved + own_column(program, lookup, c) : row_in<T>(program, call, piece, rows[c], room);
    };
    switch (lookup.operation) {
        case CONCAT:
            for (int64_t c = 0; c < lookup.num_pieces; ++c) {
                const Piece& piece = pieces[c];
                float* out = v + piece.column;
                if (piece.is_block()) {
                    const Weight& weight = program.weights[piece.weight];
                    const int64_t offset = rows[c] - weight.start - piece.base;
                    const float sign = piece.has_sign ? hash_sign(id, piece.sign_seed) : 1.0f;
                    auto take = [&](auto* slab) {
                        if (offset + piece.width <= piece.b) {
                            with_dim<T>(piece.width, [&](auto w) {
                                each<w>(piece.width, [&](int64_t d, auto n) { put<n>(out + d, sign * get<n>(slab + offset + d)); });
                            });
                            return;
                        }
                        for (int64_t o = 0; o < piece.width; ++o) out[o] = sign * load(slab + (offset + o) % piece.b);
                    };
                    const void* values = call.weights[piece.weight];
                    if (weight.format == PLAIN) {
                        take(static_cast<const T*>(values) + piece.base);
                    } else if (weight.format == BRAINS) {
                        take(static_cast<const bfloat16*>(values) + piece.base);
                    } else {
                        for (int64_t o = 0; o < piece.width; ++o)
                            out[o] = sign * scalar_of(program, call, piece, (offset + o) % piece.b);
                    }
                    continue;
                }
                const T* row = row_at(piece, c);
                if (piece.width == dim) {
                    each<D>(dim, [&](int64_t d, auto n) { put<n>(out + d, get<n>(row + d)); });
                } else {
                    with_dim<T>(piece.width, [&](auto w) {
                        each<w>(piece.width, [&](int64_t d, auto n) { put<n>(out + d, get<n>(row + d)); });
                    });
                }
            }
            break;
        case SUM:
        case MEAN:
            for (int64_t c = 0; c < lookup.num_pieces; ++c) {
                const T* row = row_at(pieces[c], c);
                const float sign = pieces[c].has_sign ? hash_sign(id, pieces[c].sign_seed) : 1.0f;
                each<D>(dim, [&](int64_t d, auto n) {
                    const auto value = sign * get<n>(row + d);
                    put<n>(v + d, c ? get<n>(v + d) + value : value);
                });
            }
            if (lookup.operation == MEAN) {
                const float count = static_cast<float>(lookup.num_pieces);
                each<D>(dim, [&](int64_t d, auto n) { put<n>(v + d, get<n>(v + d) / count); });
            }
            break;
        case MULT: {
            const T* first = row_at(pieces[0], 0);
            each<D>(dim, [&](int64_t d, auto n) { put<n>(v + d, get<n>(first + d)); });
            const T* second = row_at(pieces[1], 1);  // which may be unpacked to where the first one was
            each<D>(dim, [&](int64_t d, auto n) { put<n>(v + d, get<n>(v + d) * get<n>(second + d)); });
            for (int64_t c = 2; c < lookup.num_pieces; ++c) {
                const T* row = row_at(pieces[c], c);
                each<D>(dim, [&](int64_t d, auto n) { put<n>(v + d, get<n>(v + d) * get<n>(row + d)); });
            }
            break;
        }
        case LIST_SUM:
        case LIST_MEAN: {
            const int64_t count = list_length(lookup, rows);
            for (int64_t c = 0; c < count; ++c) {
                const T* row = row_at(pieces[0], c);
                each<D>(dim, [&](int64_t d, auto n) { put<n>(v + d, c ? get<n>(v + d) + get<n>(row + d) : get<n>(row + d)); });
            }
            if (lookup.operation == LIST_MEAN) {
                const float divisor = static_cast<float>(count);
                each<D>(dim, [&](int64_t d, auto n) { put<n>(v + d, get<n>(v + d) / divisor); });
            }
            break;
        }
        default: {  // MIXED
            const Piece& piece = alternative_of(program, lookup, rows[0]);
            const T* row = row_in<T>(program, call, piece, rows[0], room);
            if (piece.projection < 0) {
                each<D>(dim, [&](int64_t d, auto n) { put<n>(v + d, get<n>(row + d)); });
                break;
            }
            project_one<T, D>(static_cast<const T*>(call.projections[piece.projection]), row, piece.width, dim, v);
        }
    }
}

// Whether zeros follow the combination.
inline bool zeros_follow(const Lookup& lookup) { return lookup.projection < 0 && lookup.inner < lookup.dim; }

// The combination of a lookup that is not the whole vector: of any width, so that it is compiled once.
template <class T>
__attribute__((noinline)) void combine_inner(const Program& program, const Call& call, const Lookup& lookup,
                                             const int64_t* rows, int64_t id, const T* saved, float* u, float* room) {
    with_dim<T>(lookup.inner, [&](auto width) {
        combine<T, width.value>(program, call, lookup, rows, id, saved, u, room);
    });
}

// The vector of an id, v [D]; `u` has room for its combination where a projection follows.
template <class T, int D>
inline void vector_of(const Program& program, const Call& call, const Lookup& lookup, const int64_t* rows, int64_t id,
                      float* __restrict v, float* __restrict u, float* room) {
    const int64_t dim = fixed<D>(lookup.dim);
    if (lookup.num_pieces == 0 || rows[0] < 0) {
        for (int64_t d = 0; d < dim; ++d) v[d] = 0;
        return;
    }
    const Lookup& by = looked_up_by(program, lookup, rows[0]);
    if (zeros_follow(by)) {
        combine_inner<T>(program, call, by, rows, id, nullptr, v, room);
        for (int64_t d = by.inner; d < dim; ++d) v[d] = 0;
        return;
    }
    if (by.projection < 0) return combine<T, D>(program, call, by, rows, id, nullptr, v, room);
    combine_inner<T>(program, call, by, rows, id, nullptr, u, room);
    if (by.inner_projection < 0)
        return project_one<T, D>(static_cast<const T*>(call.projections[by.projection]), u, by.inner, dim, v);
    float* middle = u + by.inner;
    project_one<T, 0>(static_cast<const T*>(call.projections[by.inner_projection]), u, by.inner, by.middle, middle);
    project_one<T, D>(static_cast<const T*>(call.projections[by.projection]), middle, by.middle, dim, v);
}

// Room that ids of any lookup need beside their vectors for combinations that a projection follows, or two.
inline int64_t widest_inner(const Program& program) {
    int64_t widest = 0;
    for (int64_t l = 0; l < program.num_lookups + program.num_rests; ++l) {
        const Lookup& lookup = program.lookups[l];
        if (lookup.projection >= 0)
            widest = std::max(widest, lookup.inner + (lookup.inner_projection < 0 ? 0 : lookup.middle));
    }
    return widest;
}

// Room for one row that is unpacked.
inline int64_t widest_unpacked(const Program& program) {
    int64_t widest = 0;
    for (int64_t w = 0; w < program.num_weights; ++w)
        if (program.weights[w].format != PLAIN) widest = std::max(widest, program.weights[w].width);
    return widest;
}

// ---- alternatives with projections, the ids of each alternative together ---------------------------------------------
//
// Which alternative an id has cannot be foreseen, so that a processor would guess wrong at most ids. Sorted by
// alternative, ids run through loops of one width.

// Calls f(piece, index, rows, count) for each alternative that ids have, with the numbers of these among the n, and their
// rows. Those of ids of the rest are left in `left`; how many they are is returned.
template <class F>
inline int64_t by_alternative(const Program& program, const Lookup& lookup, const int64_t* rows, int64_t stride, int64_t n,
                              int64_t* left, const F& f) {
    int64_t index[BLOCK_OF_IDS], own[BLOCK_OF_IDS], own_left[BLOCK_OF_IDS];
    for (int64_t i = 0; i < n; ++i) left[i] = i, own_left[i] = rows[i * stride];
    for (int64_t c = 0; c < lookup.num_pieces && n > 0; ++c) {
        const Piece& piece = program.pieces[lookup.first_piece + c];
        const Span slab = rows_of_slab(program, piece);
        int64_t count = 0, others = 0;
        for (int64_t k = 0; k < n; ++k) {
            const int64_t i = left[k], row = own_left[k];
            const bool here = slab.holds(row);
            index[count] = left[others] = i, own[count] = own_left[others] = row;
            count += here, others += !here;
        }
        n = others;
        if (count > 0) f(piece, index, own, count);
    }
    return n;
}

// The dimensions for which there is such code.
template <int D>
constexpr bool has_narrow_rows = D == 8 || D == 16 || D == 32 || D == 64;

// Backward of row_i · projection for some of n ids: the gradients of these rows, own [width] at own + i * own_stride, and
// that of the projection, added to `total`, or none where that is null.
template <int D>
inline void project_back(const float* values, int64_t start, int64_t width, const float* projection, const int64_t* index,
                         const int64_t* rows, int64_t count, const float* gradient, int64_t stride, float* own,
                         int64_t own_stride, float* total) {
    constexpr int N = D < REGISTER ? D : REGISTER;
    for (int64_t from = 0; from < width; from += N) {
        const int64_t some = std::min<int64_t>(N, width - from);
        float columns[D][N] = {};
        for (int64_t j = 0; j < some; ++j)
            for (int d = 0; d < D; ++d) columns[d][j] = projection[(from + j) * D + d];
        for (int64_t k = 0; k < count; ++k) {
            const float* g = gradient + index[k] * stride;
            // Two running sums, for the sake of speed: of the first half of the dimensions, and of the second.
            lanes<N> low = g[0] * get<N>(columns[0]), high = g[D / 2] * get<N>(columns[D / 2]);
            for (int d = 1; d < D / 2; ++d) low += g[d] * get<N>(columns[d]), high += g[D / 2 + d] * get<N>(columns[D / 2 + d]);
            float both[N];
            put<N>(both, low + high);
            float* to = own + index[k] * own_stride + from;
            for (int64_t j = 0; j < some; ++j) to[j] = both[j];
        }
    }
    if (!total) return;
    for (int64_t k = 0; k < count; ++k) {
        const float* row = values + (rows[k] - start) * width;
        const float* g = gradient + index[k] * stride;
        for (int64_t j = 0; j < width; ++j)
            for (int d = 0; d < D; d += N) put<N>(total + j * D + d, get<N>(total + j * D + d) + row[j] * get<N>(g + d));
    }
}

// The vectors of up to BLOCK_OF_IDS ids, but for those of the rest; whether that was possible.
template <class T, int D>
bool gather_alternatives(const Program& program, const Call& call, const Lookup& lookup, const int64_t* rows,
                         int64_t row_stride, int64_t n, T* out, int64_t stride) {
    if constexpr (!std::is_same<T, float>::value || !has_narrow_rows<D>) {
        return false;
    } else {
        for (int64_t c = 0; c < lookup.num_pieces; ++c)
            if (program.weights[program.pieces[lookup.first_piece + c].weight].format != PLAIN) return false;
        int64_t left[BLOCK_OF_IDS];
        n = by_alternative(program, lookup, rows, row_stride, n, left, [&](const Piece& piece, const int64_t* index,
                                                                           const int64_t* found, int64_t count) {
            const Weight& weight = program.weights[piece.weight];
            const float* values = static_cast<const float*>(call.weights[piece.weight]);
            if (piece.projection < 0) {
                for (int64_t k = 0; k < count; ++k)
                    std::memcpy(out + index[k] * stride, values + (found[k] - weight.start) * D, D * sizeof(float));
                return;
            }
            const float* projection = static_cast<const float*>(call.projections[piece.projection]);
            for (int64_t k = 0; k < count; ++k)
                project_one<float, D>(projection, values + (found[k] - weight.start) * weight.width, weight.width, D, out + index[k] * stride);
        });
        for (int64_t k = 0; k < n; ++k)
            if (rows[left[k] * row_stride] < 0) std::memset(out + left[k] * stride, 0, D * sizeof(float));
        return true;
    }
}

// How a lookup's ids and addresses lie: id i of the lookup at ids[i * stride], its rows at rows[i * row_stride].
struct Place {
    int64_t first_id, stride, rows, row_stride, num_ids;
};

inline Place place_of(const Program& program, const Call& call, int64_t l, const int64_t* starts) {
    const Lookup& lookup = program.lookups[l];
    if (call.offsets == nullptr) return {lookup.column, program.num_features, starts[l], program.rows_per_example, call.batch};
    const int64_t first = call.offsets[lookup.column * call.batch];
    return {first, 1, starts[l], lookup.num_rows, call.offsets[(lookup.column + 1) * call.batch] - first};
}

// First address of each lookup: within an example, or with offsets in the whole.
inline void row_starts(const Program& program, const Call& call, int64_t* starts) {
    int64_t next = 0;
    for (int64_t l = 0; l < program.num_lookups; ++l) {
        starts[l] = next;
        const Lookup& lookup = program.lookups[l];
        int64_t ids = 1;
        if (call.offsets != nullptr)
            ids = call.offsets[(lookup.column + 1) * call.batch] - call.offsets[lookup.column * call.batch];
        next += ids * lookup.num_rows;
    }
    starts[program.num_lookups] = next;
}

// The ids of bags [first, last) of a lookup, counted from its first one.
inline void ids_of_bags(const Call& call, const Lookup& lookup, int64_t& first, int64_t& last) {
    if (call.offsets == nullptr) return;
    const int64_t* offsets = call.offsets + lookup.column * call.batch;
    first = offsets[first] - offsets[0], last = offsets[last] - offsets[0];
}

// What a bag's vectors are divided by: for a mean the ids that are no padding, at least 1.
inline float divisor_of(const Lookup& lookup, const Output& output, const int64_t* rows, int64_t stride, int64_t n) {
    if (output.pooling != POOL_MEAN || lookup.num_rows == 0) return 1.0f;
    int64_t count = lookup.has_padding ? 0 : n;
    if (lookup.has_padding)
        for (int64_t i = 0; i < n; ++i) count += rows[i * stride] != PADDING;
    return static_cast<float>(count > 1 ? count : 1);
}

// ---- from addresses to vectors ---------------------------------------------------------------------------------------

// Ids of a lookup whose rows are on their way: no more than BLOCK_OF_IDS.
struct Part {
    int64_t lookup, first, n;     // ids [first, first + n), counted from the lookup's first one
    int64_t first_bag, last_bag;  // the ids of these bags go through one part after another
    bool begins;                  // the first part of these bags
    Place place;
    const int64_t* ids;           // as their table takes them
    const int64_t* rows;
    int64_t row_stride;
};

// The bag that the next part goes on with, how many of its ids were no padding, and their sum.
struct OpenBag {
    int64_t number, count;
    float* sum;
};

// Where the numbers of a part's rows lie: the addresses that were noted of them, where those below 0 stand for none; or
// ids that are such numbers themselves but for `shift`, which are noted on the way, if at all.
struct Numbers {
    const void* first;
    int64_t bytes, stride, n;
    uint64_t size;  // a number beyond is met with zeros,
    bool* beyond;   // and said here
    int64_t shift;
    int64_t* noted;  // or null
    int64_t noted_stride;

    Numbers(const int64_t* addresses, int64_t stride, int64_t n, bool* beyond)
        : first(addresses), bytes(8), stride(stride), n(n), size(uint64_t{1} << 63), beyond(beyond), shift(0), noted(nullptr) {}
    Numbers(const Program& program, const Call& call, const Part& part, bool* beyond)
        : bytes(call.id_bytes), stride(part.place.stride), n(part.n), beyond(beyond) {
        const Lookup& lookup = program.lookups[part.lookup];
        const Piece& piece = program.pieces[lookup.first_piece];
        first = static_cast<const char*>(call.ids) + (part.place.first_id + part.first * stride) * bytes;
        size = static_cast<uint64_t>(lookup.size), shift = program.weights[piece.weight].start + piece.base;
        noted = call.rows ? call.rows + part.place.rows + part.first * part.place.row_stride : nullptr;
        noted_stride = part.place.row_stride;
    }

    // Whether they are of 64 bits, and not noted: as a rule where nothing is trained.
    bool are_read_alone() const { return bytes == 8 && !noted; }

    __attribute__((always_inline)) uint64_t at(int64_t i, bool wide) const {
        const int64_t place = i * stride;
        return static_cast<uint64_t>(wide ? static_cast<const int64_t*>(first)[place] : static_cast<const int32_t*>(first)[place]);
    }
};

// The vectors of ids that are one row each: read(i, f) as in stored.h, for number i of a part's ids. ALONE: whether their
// numbers are read alone.
template <class Rows, int D, bool ALONE>
struct OneRow {
    static constexpr int LANES = Rows::LANES;
    const Rows rows;
    const Numbers numbers;
    int64_t dim;

    __attribute__((always_inline)) uint64_t number_of(int64_t i) const { return numbers.at(i, ALONE || numbers.bytes == 8); }

    __attribute__((always_inline)) void ask_for(int64_t i) const {
        const uint64_t number = number_of(i);
        rows.ask(static_cast<int64_t>(number < numbers.size ? number : 0) + numbers.shift);
    }

    // The first ones have been asked for.
    __attribute__((always_inline)) void ask(int64_t i) const {
        if (i + READ_AHEAD < numbers.n) ask_for(i + READ_AHEAD);
    }

    template <class F>
    __attribute__((always_inline)) void read(int64_t i, const F& f) const {
        const uint64_t number = number_of(i);
        if (__builtin_expect(number < numbers.size, 1)) {
            const int64_t row = static_cast<int64_t>(number) + numbers.shift;
            if (!ALONE && numbers.noted) numbers.noted[i * numbers.noted_stride] = row;
            return rows.read(row, f);
        }
        *numbers.beyond = true;
        auto zeros = [&](auto d, auto n) __attribute__((always_inline)) { f(d, n, lanes<n>{}); };
        if constexpr (D > 0) each_of<LANES>(std::make_integer_sequence<int, D / LANES>{}, zeros);
        else each_or_twice<D>(dim, zeros);
    }
};

// How vectors are put together from several rows in floats, without more.
enum Fold { BESIDE, ADDED, AVERAGED_OUT, MULTIPLIED };

// Such vectors: rows, or blocks of scalars, of W columns side by side, or rows of D added up, averaged or multiplied. All
// of them have been asked for.
template <int D, int W, Fold FOLD>
struct Folded {
    static constexpr int LANES = W < REGISTER ? W : REGISTER, MOST = FOLD == BESIDE ? D / W : 4;
    const int64_t* addresses;
    int64_t stride, num_pieces;
    struct {
        const float* slab;
        int64_t start, step;  // the first address of the slab, and scalars from one to the next
        int64_t last;         // the last address where a block begins that does not go on from the slab's beginning
    } pieces[MOST];

    Folded(const Program& program, const Call& call, const Part& part) : addresses(part.rows), stride(part.row_stride) {
        const Lookup& lookup = program.lookups[part.lookup];
        num_pieces = lookup.num_pieces;
        for (int64_t c = 0; c < num_pieces; ++c) {
            const Piece& piece = program.pieces[lookup.first_piece + c];
            const Weight& weight = program.weights[piece.weight];
            const int64_t base = piece.is_block() ? piece.base : 0, start = weight.start + base;
            pieces[c] = {static_cast<const float*>(call.weights[piece.weight]) + base * weight.width, start, weight.width,
                         piece.is_block() ? start + piece.b - W : INT64_MAX};
        }
    }

    void ask(int64_t) const {}

    template <class F>
    __attribute__((always_inline)) void read(int64_t i, const F& f) const {
        constexpr int N = LANES;
        const int64_t* own = addresses + i * stride;
        if (__builtin_expect(own[0] < 0, 0)) {  // padding
            each_of<N>(std::make_integer_sequence<int, D / N>{}, [&](auto d, auto n) __attribute__((always_inline)) {
                f(d, n, lanes<n>{});
            });
        } else if constexpr (FOLD == BESIDE) {
            each_of<W>(std::make_integer_sequence<int, D / W>{}, [&](auto column, auto) __attribute__((always_inline)) {
                const auto& piece = pieces[column / W];
                const int64_t at = own[column / W];
                float room[W];
                const float* row = piece.slab + (at - piece.start) * piece.step;
                if (__builtin_expect(at > piece.last, 0)) {
                    const int64_t size = piece.last + W - piece.start;
                    for (int64_t o = 0; o < W; ++o) room[o] = piece.slab[(at - piece.start + o) % size];
                    row = room;
                }
                each_of<N>(std::make_integer_sequence<int, W / N>{}, [&](auto d, auto n) __attribute__((always_inline)) {
                    f(std::integral_constant<int, column + d>{}, n, get<n>(row + d));
                });
            });
        } else {
            lanes<N> v[D / N];
            for (int64_t c = 0; c < num_pieces; ++c) {
                const float* row = pieces[c].slab + (own[c] - pieces[c].start) * D;
                each_of<N>(std::make_integer_sequence<int, D / N>{}, [&](auto d, auto n) __attribute__((always_inline)) {
                    const lanes<N> value = get<n>(row + d);
                    v[d / N] = c == 0 ? value : FOLD == MULTIPLIED ? v[d / N] * value : v[d / N] + value;
                });
            }
            const float count = static_cast<float>(num_pieces);
            each_of<N>(std::make_integer_sequence<int, D / N>{}, [&](auto d, auto n) __attribute__((always_inline)) {
                f(d, n, FOLD == AVERAGED_OUT ? v[d / N] / count : v[d / N]);
            });
        }
    }
};

// The columns of pieces that lie side by side, D if they are rows to be added, averaged or multiplied; 0 where neither is
// all there is to a vector.
template <class T>
inline int64_t folded_width(const Program& program, const Lookup& lookup) {
    const Piece* pieces = program.pieces + lookup.first_piece;
    const bool beside = lookup.operation == CONCAT;
    if (!std::is_same<T, float>::value || lookup.rest >= 0 || lookup.projection >= 0 || lookup.inner != lookup.dim) return 0;
    if (!beside && lookup.operation != SUM && lookup.operation != MEAN && lookup.operation != MULT) return 0;
    if (lookup.num_pieces < 1 || (!beside && lookup.num_pieces > 4)) return 0;
    const int64_t width = beside ? pieces[0].width : lookup.dim;
    for (int64_t c = 0; c < lookup.num_pieces; ++c) {
        const Piece& piece = pieces[c];
        if (program.weights[piece.weight].format != PLAIN || piece.has_sign || piece.width != width) return 0;
        if (piece.is_block() && (!beside || piece.b < width)) return 0;
        if (beside && piece.column != c * width) return 0;
    }
    return width;
}

// Those that are put together from several rows in any other way, or projected.
template <class T, int D>
struct Combined {
    static constexpr int LANES = D < REGISTER ? D : REGISTER;
    const Program& program;
    const Call& call;
    const Part& part;
    float *vector, *inner, *room;  // the last two as vector_of takes them

    void ask(int64_t) const {}  // which has been done

    template <class F>
    __attribute__((always_inline)) void read(int64_t i, const F& f) const {
        const Lookup& lookup = program.lookups[part.lookup];
        vector_of<T, D>(program, call, lookup, part.rows + i * part.row_stride, part.ids[i], vector, inner, room);
        each<D>(fixed<D>(lookup.dim), [&](auto d, auto n) __attribute__((always_inline)) { f(d, n, get<n>(vector + d)); });
    }
};

// A sum of vectors, in registers where D is not 0; `open` holds it from part to part.
template <int D, int N>
struct Sum {
    float* open;
    int64_t dim;
    lanes<N> sums[(D < 0 ? -D : D) / N];

    template <class F>
    __attribute__((always_inline)) void each_lanes(const F& f) const {
        if constexpr (D > 0) each_of<N>(std::make_integer_sequence<int, D / N>{}, f);
        else each_or_twice<D>(dim, f);
    }
    Sum(float* open, int64_t dim) : open(open), dim(dim) {
        each_lanes([&](auto d, auto) __attribute__((always_inline)) { sums[number_of<N>(d)] = get<N>(open + d); });
    }
    template <class Place, class V>
    __attribute__((always_inline)) void add(Place d, std::integral_constant<int, N>, V v) {
        sums[number_of<N>(d)] += v;
    }
    template <class F>
    __attribute__((always_inline)) void take(const F& f) {
        each_lanes([&](auto d, auto n) __attribute__((always_inline)) {
            lanes<N>& own = sums[number_of<N>(d)];
            f(d, n, own);
            own = lanes<N>{};
        });
    }
    __attribute__((always_inline)) void keep() {
        each_lanes([&](auto d, auto) __attribute__((always_inline)) { put<N>(open + d, sums[number_of<N>(d)]); });
    }
};

template <int N>
struct Sum<0, N> {
    float* open;
    int64_t dim;

    Sum(float* open, int64_t dim) : open(open), dim(dim) {}
    template <int M, class V>
    __attribute__((always_inline)) void add(int64_t d, std::integral_constant<int, M>, V v) {
        put<M>(open + d, get<M>(open + d) + v);
    }
    template <class F>
    __attribute__((always_inline)) void take(const F& f) {
        each<0>(dim, [&](auto d, auto n) __attribute__((always_inline)) {
            f(d, n, get<n>(open + d));
            put<n>(open + d, lanes<n>{});
        });
    }
    void keep() {}
};

// Writes the vectors of a part's ids, or goes on with the sums of their bags.
template <class T, int D, class Vectors>
__attribute__((noinline)) void write_part(const Program& program, const Call& call, const Part& part, const Vectors vectors,
                                          OpenBag& bag) {
    const Lookup& lookup = program.lookups[part.lookup];
    const Output output = call.outputs[part.lookup];
    const int64_t dim = fixed<D>(lookup.dim), n = part.n, stride = part.place.stride;
    const float* id_weights = call.id_weights ? call.id_weights + part.place.first_id + part.first * stride : nullptr;
    T* to = static_cast<T*>(call.values) + output.start;
    if (call.offsets == nullptr || output.pooling == NONE) {
        to += part.first * output.stride;
        for (int64_t i = 0; i < n; ++i, to += output.stride) {
            vectors.ask(i);
            const float factor = id_weights ? id_weights[i * stride] : 1.0f;
            vectors.read(i, [&](auto d, auto m, auto v) __attribute__((always_inline)) { put<m>(to + d, factor * v); });
        }
        return;
    }
    const int64_t* offsets = call.offsets + lookup.column * call.batch;
    const int64_t start = offsets[0] + part.first;
    const bool means = output.pooling == POOL_MEAN;
    if (part.begins) {
        bag.number = part.first_bag, bag.count = 0;
        for (int64_t d = 0; d < dim; ++d) bag.sum[d] = 0;
    }
    Sum<D, Vectors::LANES> sum(bag.sum, dim);
    for (int64_t i = 0; bag.number < part.last_bag; ++bag.number) {
        const int64_t bag_end = offsets[bag.number + 1] - start, end = std::min(bag_end, n);
        for (int64_t k = i; means && k < end; ++k) bag.count += !lookup.has_padding || part.ids[k] != lookup.padding;
        if (id_weights) {
            for (; i < end; ++i) {
                vectors.ask(i);
                const float factor = id_weights[i];
                vectors.read(i, [&](auto d, auto m, auto v) __attribute__((always_inline)) { sum.add(d, m, factor * v); });
            }
        } else {
            for (; i < end; ++i) {
                vectors.ask(i);
                vectors.read(i, [&](auto d, auto m, auto v) __attribute__((always_inline)) { sum.add(d, m, v); });
            }
        }
        if (bag_end > n) break;
        T* vector = to + bag.number * output.stride;
        const float divisor = means && bag.count > 1 ? static_cast<float>(bag.count) : 1.0f;
        if (divisor != 1.0f)
            sum.take([&](auto d, auto m, auto v) __attribute__((always_inline)) { put<m>(vector + d, v / divisor); });
        else
            sum.take([&](auto d, auto m, auto v) __attribute__((always_inline)) { put<m>(vector + d, v); });
        bag.count = 0;
    }
    sum.keep();
}

// As write_part, of vectors that are Folded; whether that was possible.
template <class T, int D>
bool write_folded(const Program& program, const Call& call, const Part& part, OpenBag& bag) {
    if constexpr (D < 8 || !std::is_same<T, float>::value) {
        return false;
    } else {
        const Lookup& lookup = program.lookups[part.lookup];
        const int64_t width = folded_width<T>(program, lookup);
        auto write = [&](auto columns, auto fold) {
            write_part<T, D>(program, call, part, Folded<D, columns, fold>(program, call, part), bag);
            return true;
        };
        if (width == 0) return false;
        switch (lookup.operation) {
            case SUM: return write(std::integral_constant<int, D>{}, std::integral_constant<Fold, ADDED>{});
            case MEAN: return write(std::integral_constant<int, D>{}, std::integral_constant<Fold, AVERAGED_OUT>{});
            case MULT: return write(std::integral_constant<int, D>{}, std::integral_constant<Fold, MULTIPLIED>{});
            default:
                if (width == D / 2) return write(std::integral_constant<int, D / 2>{}, std::integral_constant<Fold, BESIDE>{});
                if (width == D / 4) return write(std::integral_constant<int, D / 4>{}, std::integral_constant<Fold, BESIDE>{});
                return false;
        }
    }
}

// The vectors of those of a part's ids that no alternative holds.
template <class T, int D>
void gather_rest(const Program& program, const Call& call, const Part& part, T* to, int64_t stride, float* scratch, float* room) {
    const Lookup& lookup = program.lookups[part.lookup];
    for (int64_t i = 0; i < part.n; ++i) {
        const int64_t* rows = part.rows + i * part.row_stride;
        if (rows[0] < 0 || &looked_up_by(program, lookup, rows[0]) == &lookup) continue;
        vector_of<T, D>(program, call, lookup, rows, part.ids[i], scratch, scratch + lookup.dim, room);
        each<D>(fixed<D>(lookup.dim), [&](auto d, auto n) { put<n>(to + i * stride + d, get<n>(scratch + d)); });
    }
}

// As write_part, of vectors that are one row each.
template <class T>
void write_rows(const Program& program, const Call& call, const Part& part, const Numbers& numbers, OpenBag& bag) {
    const Lookup& lookup = program.lookups[part.lookup];
    const Piece& piece = program.pieces[lookup.first_piece];
    const bool floats = std::is_same<T, float>::value && program.weights[piece.weight].format == PLAIN;
    auto write = [&](auto dim) {
        with_rows<T, dim>(program, call, piece, [&](const auto& rows) {
            using Rows = std::decay_t<decltype(rows)>;
            if constexpr (may_be_trained<Rows>) {
                if (!numbers.are_read_alone())
                    return write_part<T, dim>(program, call, part, OneRow<Rows, dim, false>{rows, numbers, lookup.dim}, bag);
            }
            write_part<T, dim>(program, call, part, OneRow<Rows, dim, true>{rows, numbers, lookup.dim}, bag);
        });
    };
    if (floats) with_any_dim<T>(lookup.dim, write);
    else with_dim<float>(has_own_code(lookup.dim) ? lookup.dim : 0, write);
}

// Asks for the first rows of a part.
template <class T>
__attribute__((noinline)) void ask_first(const Program& program, const Call& call, const Part& part, const Numbers& numbers) {
    with_rows<T, 0>(program, call, program.pieces[program.lookups[part.lookup].first_piece], [&](const auto& rows) {
        using Rows = std::decay_t<decltype(rows)>;
        const OneRow<Rows, 0, false> vectors{rows, numbers, 0};
        for (int64_t i = 0; i < std::min(READ_AHEAD, numbers.n); ++i) vectors.ask_for(i);
    });
}

// `scratch` has room for a vector, and what vector_of needs beside it.
template <class T>
inline void gather(const Program& program, const Call& call, const Part& part, OpenBag& bag, float* scratch, float* room) {
    const Lookup& lookup = program.lookups[part.lookup];
    if (is_one_row(program, lookup)) {
        bool none = false;  // of which nobody hears: padding
        return write_rows<T>(program, call, part, Numbers(part.rows, part.row_stride, part.n, &none), bag);
    }
    with_dim<T>(lookup.dim, [&](auto dim) {
        if (lookup.operation == SPARSE) {
            const Piece& piece = program.pieces[lookup.first_piece];
            const SparseVectors<T, dim> vectors(program, call, piece, part.rows, part.row_stride, part.ids, scratch);
            return write_part<T, dim>(program, call, part, vectors, bag);
        }
        if (lookup.operation == MIXED && !call.id_weights && (call.offsets == nullptr || call.outputs[part.lookup].pooling == NONE)) {
            const Output& output = call.outputs[part.lookup];
            T* to = static_cast<T*>(call.values) + output.start + part.first * output.stride;
            if (gather_alternatives<T, dim>(program, call, lookup, part.rows, part.row_stride, part.n, to, output.stride)) {
                if (lookup.rest >= 0) gather_rest<T, dim>(program, call, part, to, output.stride, scratch, room);
                return;
            }
        }
        if (write_folded<T, dim>(program, call, part, bag)) return;
        const Combined<T, dim> vectors{program, call, part, scratch, scratch + lookup.dim, room};
        write_part<T, dim>(program, call, part, vectors, bag);
    });
}

inline bool offsets_fit(const Program& program, const Call& call) {
    const int64_t last = program.num_features * call.batch;
    bool falls = false;
    for (int64_t i = 0; i < last; ++i) falls |= call.offsets[i] > call.offsets[i + 1];
    return !falls && call.offsets[0] == 0 && call.offsets[last] == call.num_ids;
}

// Whether the ids of a lookup are the numbers of their rows, but for a shift, and can be read along with them: all but those
// of packed rows that are not read alone.
inline bool is_numbered(const Program& program, const Call& call, const Lookup& lookup) {
    if (lookup.operation != CONCAT || !is_one_row(program, lookup)) return false;
    const Piece& piece = program.pieces[lookup.first_piece];
    const int64_t format = program.weights[piece.weight].format;
    const bool packed = format == INTEGERS || format == SIGNS;
    return piece.kind == ROW && lookup.code < 0 && lookup.policy == REFUSE && !lookup.has_padding &&
           (!packed || (call.id_bytes == 8 && !call.rows));
}

// The first bag, or example, of a part of the work: all parts have about as many ids.
inline int64_t first_of_part(const Program& program, const Call& call, int64_t part, int64_t parts) {
    if (call.offsets == nullptr || part == 0 || part == parts) return call.batch * part / parts;
    auto ids_before = [&](int64_t bag) {
        int64_t count = 0;
        for (int64_t f = 0; f < program.num_features; ++f)
            count += call.offsets[f * call.batch + bag] - call.offsets[f * call.batch];
        return count;
    };
    const int64_t wanted = call.num_ids * part / parts;
    int64_t first = 0, last = call.batch;
    while (first < last) {
        const int64_t middle = first + (last - first) / 2;
        if (ids_before(middle) < wanted) first = middle + 1;
        else last = middle;
    }
    return first;
}

// What one thread looks up, a window of ids at a time, of one lookup or of several: while the vectors of these are
// written, the rows of the next ones are on their way.
template <class T>
struct Walk {
    struct Window {
        Part parts[BLOCK_OF_IDS];
        int64_t ids[BLOCK_OF_IDS];
        int64_t* rows;
        int64_t num_parts = 0, num_ids = 0, num_rows = 0;
    };

    const Program& program;
    const Call& call;
    const int64_t* starts;  // from row_starts
    std::vector<float> floats;
    std::unique_ptr<int64_t[]> rows;  // where the call does not keep them
    float *scratch, *room;
    OpenBag bag, bag_of_numbered;
    std::vector<char> numbered;  // of each lookup
    int64_t end;                 // of the bags or examples of this thread
    Window windows[2];
    int now = 0;
    int64_t refused[2];  // lookup and id

    Walk(const Program& program, const Call& call, const int64_t* starts, int64_t first, int64_t end)
        : program(program), call(call), starts(starts), numbered(program.num_lookups), end(end) {
        int64_t widest = 1, most_rows = 1;
        for (int64_t l = 0; l < program.num_lookups; ++l) {
            widest = std::max(widest, program.lookups[l].dim);
            most_rows = std::max(most_rows, program.lookups[l].num_rows);
        }
        const int64_t scratch_size = widest + widest_inner(program);
        floats.resize(2 * widest + scratch_size + widest_unpacked(program));
        bag.sum = floats.data(), bag_of_numbered.sum = bag.sum + widest;
        scratch = bag_of_numbered.sum + widest, room = scratch + scratch_size;
        for (int64_t l = 0; call.values && l < program.num_lookups; ++l) numbered[l] = is_numbered(program, call, program.lookups[l]);
        ask_first_of(0, first);
        if (call.rows) return;
        rows.reset(new int64_t[2 * BLOCK_OF_IDS * most_rows]);
        windows[0].rows = rows.get(), windows[1].rows = rows.get() + BLOCK_OF_IDS * most_rows;
    }

    // The bags or examples [first, last) of all lookups; false where an id is refused.
    bool look_up(int64_t first, int64_t last) {
        for (int64_t l = 0; l < program.num_lookups; ++l) {
            const bool is_last = l + 1 == program.num_lookups;
            ask_first_of(is_last ? 0 : l + 1, is_last ? last : first);
            if (numbered[l]) {
                if (!look_up_numbered(part_of(l, first, last))) return false;
                continue;
            }
            const Place place = place_of(program, call, l, starts);
            int64_t begin = first, end = last;
            ids_of_bags(call, program.lookups[l], begin, end);
            int64_t i = begin;
            do {  // once where there are no ids, for the sake of empty bags
                const Window& window = windows[now];
                if (window.num_ids == BLOCK_OF_IDS || window.num_parts == BLOCK_OF_IDS) turn();
                const int64_t n = std::min(BLOCK_OF_IDS - windows[now].num_ids, end - i);
                if (!take({l, i, n, first, last, i == begin, place, nullptr, nullptr, place.row_stride})) return false;
                i += n;
            } while (i < end);
        }
        return true;
    }

    // All ids of some bags or examples of a lookup.
    Part part_of(int64_t l, int64_t first, int64_t last) const {
        int64_t begin = first, end = last;
        ids_of_bags(call, program.lookups[l], begin, end);
        return {l, begin, end - begin, first, last, true, place_of(program, call, l, starts), nullptr, nullptr, 0};
    }

    // Asks for the first rows of the bags or examples from `first` on, which come next but one.
    void ask_first_of(int64_t l, int64_t first) const {
        if (!numbered[l] || first >= end) return;
        const Part part = part_of(l, first, std::min(end, first + BLOCK_OF_BAGS));
        ask_first<T>(program, call, part, Numbers(program, call, part, nullptr));
    }

    // Those need no window: their ids are read, checked and, where that is asked for, noted along with the rows.
    bool look_up_numbered(const Part& part) {
        bool beyond = false;
        const Numbers numbers(program, call, part, &beyond);
        write_rows<T>(program, call, part, numbers, bag_of_numbered);
        if (!beyond) return true;
        int64_t i = 0;
        while (numbers.at(i, call.id_bytes == 8) < numbers.size) ++i;
        refused[0] = part.lookup, refused[1] = static_cast<int64_t>(numbers.at(i, call.id_bytes == 8));
        return false;
    }

    // Adds a part to the window.
    bool take(Part part) {
        Window& window = windows[now];
        const Lookup& lookup = program.lookups[part.lookup];
        const Place& place = part.place;
        int64_t* ids = window.ids + window.num_ids;
        if (!in_range(call, lookup, place.first_id + part.first * place.stride, place.stride, part.n, ids)) {
            while (static_cast<uint64_t>(*ids) < static_cast<uint64_t>(lookup.size)) ++ids;
            refused[0] = part.lookup, refused[1] = *ids;
            return false;
        }
        if (call.values == nullptr) return true;  // which was all that was asked
        int64_t* to = call.rows + place.rows + part.first * place.row_stride;
        if (rows) {
            to = window.rows + window.num_rows;
            part.row_stride = lookup.num_rows;
        }
        address<T>(program, call, lookup, ids, part.n, to, part.row_stride);
        part.ids = ids, part.rows = to;
        window.parts[window.num_parts++] = part;
        window.num_ids += part.n, window.num_rows += part.n * lookup.num_rows;
        return true;
    }

    // Writes the vectors of the window before, which is filled next.
    void turn() {
        now = 1 - now;
        Window& window = windows[now];
        for (int64_t p = 0; p < window.num_parts; ++p) gather<T>(program, call, window.parts[p], bag, scratch, room);
        window.num_parts = window.num_ids = window.num_rows = 0;
    }
};

template <class T>
Outcome forward(const Call& call) {
    const Program program(call.program);
    if (call.offsets != nullptr && !offsets_fit(program, call)) return BAD_OFFSETS;
    std::vector<int64_t> starts(program.num_lookups + 1);
    row_starts(program, call, starts.data());
    std::atomic<bool> good{true};
    const int64_t parts = call.num_threads;
    in_parallel(parts, [&](int64_t part) {
        int64_t first = first_of_part(program, call, part, parts);
        const int64_t end = first_of_part(program, call, part + 1, parts);
        Walk<T> walk(program, call, starts.data(), first, end);
        for (; first < end && good; first += BLOCK_OF_BAGS) {
            if (walk.look_up(first, std::min(end, first + BLOCK_OF_BAGS))) continue;
            if (good.exchange(false) && call.refused) std::copy(walk.refused, walk.refused + 2, call.refused);
            return;
        }
        walk.turn(), walk.turn();
    });
    return good ? DONE : REFUSED_ID;
}

// ---- one step of the optimizer on a row ----------------------------------------------------------------------------

struct Rule {
    int64_t kind;
    float clip = 0, lr = 0, l2 = 0, eps = 0, beta1 = 0, beta2 = 0, rest1 = 0, rest2 = 0, correction1 = 0, correction2 = 0;
    // Of a running mean of the weights (AVERAGED): how many steps it spans, the steps before this one, and which part of
    // a mean at the step before is left after this one.
    double horizon = 0, steps_before = 0;
    float kept = 0;

    explicit Rule(const Call& call) : kind(call.rule & ~AVERAGED) {
        if (kind >= DENSE_GRADIENT) return;
        const double *h = call.hyper, *own = h + 2, *next = own + OWN_HYPER[kind];
        lr = static_cast<float>(h[0]), l2 = static_cast<float>(h[1]);
        if (call.rule & AVERAGED) {
            horizon = *next++, steps_before = static_cast<double>(call.step - 1);
            kept = since(steps_before, steps_before + 1);
        }
        if (next < h + call.num_hyper) clip = static_cast<float>(*next);
        if (kind != SGD) eps = static_cast<float>(own[0]);
        if (kind != ADAM) return;
        beta1 = static_cast<float>(own[1]), beta2 = static_cast<float>(own[2]);
        // 1 − β is taken in double precision: in single precision 1 − 0.999 is off by 1e-5.
        rest1 = static_cast<float>(1 - own[1]), rest2 = static_cast<float>(1 - own[2]);
        correction1 = static_cast<float>(1 - std::pow(own[1], static_cast<double>(call.step)));
        correction2 = static_cast<float>(1 - std::pow(own[2], static_cast<double>(call.step)));
    }

    // Which part of a mean at one step is left in that of a later one, as embtables.optimizers.averaged has it.
    float since(double before, double now) const {
        auto log_share = [&](double step) {
            const double early = std::min(step, horizon);
            return std::log(horizon / (horizon + 1)) * (step - early) - std::log1p(early);
        };
        return static_cast<float>(std::exp(log_share(now) - log_share(before)));
    }
};

// What a rule keeps of a weight, from some row on: what it has of its own, and with AVERAGED how far the running mean was
// from a row when that was last updated, and at which step that was. Null is what there is not.
template <class S>
struct State {
    S *first = nullptr, *second = nullptr, *behind = nullptr, *last = nullptr;

    State() = default;
    State(void* const* of_weight, int64_t number) {
        if (of_weight == nullptr) return;
        void* const* own = of_weight + STATES * number;
        first = static_cast<S*>(own[0]), second = static_cast<S*>(own[1]);
        behind = static_cast<S*>(own[2]), last = static_cast<S*>(own[3]);
    }

    // f(tensor, its columns) for all of it.
    template <class F>
    __attribute__((always_inline)) void each_tensor(const Rule& rule, int64_t width, const F& f) const {
        f(first, rule.kind == ROWWISE_ADAGRAD ? 1 : width), f(second, width), f(behind, width), f(last, int64_t{1});
    }

    // Of a row of so many columns; a scalar of a block is a row of one.
    __attribute__((always_inline)) State at(const Rule& rule, int64_t row, int64_t width) const {
        State found = *this;
        if (first) found.first += row * (rule.kind == ROWWISE_ADAGRAD ? 1 : width);
        if (second) found.second += row * width;
        if (behind) found.behind += row * width, found.last += row;
        return found;
    }
};

// A row has moved: its mean is as far behind it as it was then, of which a part is left, and so much more.
// `is_block`: it is n scalars of a block, each a row of its own.
template <class S>
__attribute__((noinline)) void move_mean(const Rule& rule, const State<S>& state, const float* moved, int64_t n, bool is_block) {
    for (int64_t i = 0; i < (is_block ? n : 1); ++i) {
        const float left = rule.since(load(state.last + i), rule.steps_before);
        each<0>(is_block ? 1 : n, [&](int64_t d, auto m) {
            put<m>(state.behind + i + d, rule.kept * (left * get<m>(state.behind + i + d) + get<m>(moved + i + d)));
        });
        store(state.last + i, static_cast<float>(rule.steps_before + 1));
    }
}

// `w`: a pointer to the row, or what is used like one. `is_block`: as for move_mean.
template <int W, class Row, class S>
inline void update_row(const Rule& rule, Row w, const State<S>& state, float* g, int64_t width, bool is_block = false) {
    const int64_t n = fixed<W>(width);
    S *const s0 = state.first, *const s1 = state.second;
    if (rule.kind >= DENSE_GRADIENT) {
        each<W>(n, [&](int64_t d, auto m) { put<m>(w + d, get<m>(g + d)); });
        return;
    }
    if (rule.clip > 0 && is_block) {
        for (int64_t i = 0; i < n; ++i) g[i] *= rule.clip / std::max(rule.clip, std::fabs(g[i]));
    } else if (rule.clip > 0) {
        const float norm = std::sqrt(dot<W>(g, g, n));
        const float factor = rule.clip / (norm < rule.clip ? rule.clip : norm);  // NaN where the norm is NaN
        each<W>(n, [&](int64_t d, auto m) { put<m>(g + d, get<m>(g + d) * factor); });
    }
    if (rule.l2 != 0) each<W>(n, [&](int64_t d, auto m) { put<m>(g + d, get<m>(g + d) + rule.l2 * get<m>(w + d)); });
    const bool averages = state.behind != nullptr;
    auto subtract = [&](int64_t d, auto m, auto change) __attribute__((always_inline)) {
        const lanes<m> before = get<m>(w + d);
        put<m>(w + d, before - change);
        // The gradient is used up: its place takes how far the row has moved.
        if (__builtin_expect(averages, 0)) put<m>(g + d, before - get<m>(w + d));
    };
    // A row of one scalar has in row-wise Adagrad the state that it has in Adagrad.
    switch (is_block && rule.kind == ROWWISE_ADAGRAD ? ADAGRAD : rule.kind) {
        case SGD:
            each<W>(n, [&](int64_t d, auto m) { subtract(d, m, rule.lr * get<m>(g + d)); });
            break;
        case ROWWISE_ADAGRAD: {
            store(s0, load(s0) + dot<W>(g, g, n) / static_cast<float>(n));
            const float rate = rule.lr / (std::sqrt(load(s0)) + rule.eps);
            each<W>(n, [&](int64_t d, auto m) { subtract(d, m, rate * get<m>(g + d)); });
            break;
        }
        case ADAGRAD:
            each<W>(n, [&](int64_t d, auto m) {
                const auto gradient = get<m>(g + d);
                const lanes<m> total = get<m>(s0 + d) + gradient * gradient;
                put<m>(s0 + d, total);
                subtract(d, m, rule.lr * gradient / (root<m>(total) + rule.eps));
            });
            break;
        default:  // ADAM
            each<W>(n, [&](int64_t d, auto m) {
                const auto gradient = get<m>(g + d);
                const lanes<m> first = rule.beta1 * get<m>(s0 + d) + rule.rest1 * gradient;
                const lanes<m> second = rule.beta2 * get<m>(s1 + d) + rule.rest2 * (gradient * gradient);
                put<m>(s0 + d, first);
                put<m>(s1 + d, second);
                const lanes<m> root_of = root<m>(second / rule.correction2);
                subtract(d, m, rule.lr * (first / rule.correction1) / (root_of + rule.eps));
            });
    }
    if (__builtin_expect(averages, 0)) move_mean(rule, state, g, n, is_block);
}

// ---- the occurrences of rows ---------------------------------------------------------------------------------------

// How many rows (or occurrences of one) ahead of their use memory is asked for.
constexpr int64_t AHEAD = 12;

// The smaller what is sorted, the sooner it is: rows are counted within a window of so many, one window after another
// being seen to. There is more than one where rows take tens of gigabytes.
#ifndef EMBTABLES_ROW_BITS
#define EMBTABLES_ROW_BITS 32
#endif
constexpr int ROW_BITS = EMBTABLES_ROW_BITS;
static_assert(ROW_BITS <= 32, "");

// A row, and where its gradient lies (see Sources).
struct Entry {
    uint32_t row, source;
};
// A stretch of a block of scalars; its row is the first of them.
struct Stretch {
    uint32_t row, source, length;
};

// Where gradients lie: that of the output, and behind it, as if they were stored there, the values made from it.
template <class T>
struct Sources {
    const T* gradient;
    const float* own;
    uint32_t own_from;

    template <class F>
    __attribute__((always_inline)) void read(uint32_t source, const F& f) const {
        if constexpr (std::is_same<T, float>::value) {
            f(source < own_from ? gradient + source : own + (source - own_from));
        } else {
            source < own_from ? f(gradient + source) : f(own + (source - own_from));
        }
    }
    __attribute__((always_inline)) void ask(uint32_t source) const {
        read(source, [](const auto* values) __attribute__((always_inline)) { __builtin_prefetch(values); });
    }
};

// Rows whose numbers agree but for the last bits belong to one thread: their state may share a cache line.
constexpr int64_t LINE_BITS = 4;
// Stretches end where a region does, for the same reason.
constexpr int64_t REGION_BITS = 10;
static_assert(REGION_BITS <= ROW_BITS, "");

inline bool belongs(uint64_t place, uint64_t part, uint64_t parts) {
    // Any function of the place that spreads evenly: two products' upper bits, since a division takes many times longer.
    return parts == 1 || (((place * 0x9E3779B97F4A7C15ull) >> 32) * parts) >> 32 == part;
}

// A buffer whose contents need no initial values.
template <class E>
struct Buffer {
    std::unique_ptr<E[]> data;
    size_t capacity = 0, size = 0;
    void reserve(size_t n) {
        // One huge batch does not keep its memory for good.
        if (n <= capacity && (capacity * sizeof(E) <= (size_t{1} << 26) || capacity / 8 <= n)) return;
        data.reset(new E[n + n / 4]);  // may throw, and then nothing has changed
        capacity = n + n / 4;
    }
};

// A list that is sorted by row.
template <class E>
struct Sorted {
    Buffer<E> entries, spare;
    std::vector<uint32_t> counts;

    const E* begin() const { return entries.data.get(); }
    const E* end() const { return begin() + entries.size; }
    // Some that are no entries may be read behind the last one, to no effect.
    void reserve(int64_t n) { entries.reserve(static_cast<size_t>(n + AHEAD)); }

    // A stable radix sort of rows below `bound`.
    void sort(uint64_t bound) {
        const size_t n = entries.size;
        if (n < 2) return;
        int bits = 1;
        while (bits < ROW_BITS && (bound - 1) >> bits) ++bits;
        // Short lists are sorted with small counters.
        const int most = n < 4096 ? 8 : 11;
        const int passes = (bits + most - 1) / most, digit = (bits + passes - 1) / passes;
        const size_t size = size_t{1} << digit;
        spare.reserve(n + static_cast<size_t>(AHEAD));
        counts.assign(2 * size * passes, 0);
        const E* all = begin();
        // Where one row follows itself, as frequent ones do, a counter would wait for itself: there are two, for every
        // other entry.
        for (size_t i = 0; i < n; ++i)
            for (int pass = 0; pass < passes; ++pass)
                ++counts[(2 * pass + (i & 1)) * size + ((all[i].row >> (pass * digit)) & (size - 1))];
        for (int pass = 0; pass < passes; ++pass) {
            uint32_t *count = counts.data() + 2 * pass * size, *others = count + size;
            uint32_t before = 0;
            for (size_t j = 0; j < size; ++j) {
                const uint32_t own = count[j] + others[j];
                count[j] = before;
                before += own;
            }
            const E* from = begin();
            E* to = spare.data.get();
            const int shift = pass * digit;
            for (size_t i = 0; i < n; ++i) to[count[(from[i].row >> shift) & (size - 1)]++] = from[i];
            std::swap(entries.data, spare.data);
            std::swap(entries.capacity, spare.capacity);
        }
    }
};

// What one part of an update works with; kept from step to step, so that no step maps memory anew.
struct Workspace {
    Sorted<Entry> rows;
    Sorted<Stretch> stretches;
    Buffer<uint32_t> runs;
    std::vector<Stretch> order;
    Buffer<float> sum;
};

// Where the occurrences of each row begin among sorted ones, and behind the last of them where they end; how many rows
// they are is returned.
inline size_t find_runs(const Entry* entry, const Entry* end, Buffer<uint32_t>& runs) {
    const size_t n = static_cast<size_t>(end - entry);
    runs.reserve(n + 1);
    uint32_t* begins = runs.data.get();
    begins[0] = 0;
    size_t count = 0;
    for (size_t i = 1; i < n; ++i) {  // written in any case and then counted or not: what comes cannot be foreseen
        begins[count + 1] = static_cast<uint32_t>(i);
        count += entry[i].row != entry[i - 1].row;
    }
    begins[++count] = static_cast<uint32_t>(n);
    return count;
}

// The sum of a run of occurrences of one row, in input order.
template <int W, class T>
inline void sum_run(const Entry* run, const Entry* end, const Sources<T>& sources, int64_t width, float* sum) {
    if constexpr (W == 0) {
        for (const Entry* entry = run; entry < end; ++entry)
            sources.read(entry->source, [&](const auto* value) {
                each<0>(width, [&](int64_t d, auto m) {
                    put<m>(sum + d, entry == run ? get<m>(value + d) : get<m>(sum + d) + get<m>(value + d));
                });
            });
    } else {
        constexpr int N = lanes_of<W>();
        lanes<N> sums[(W < 0 ? -W : W) / N];
        auto each_lanes = [&](const auto& f) __attribute__((always_inline)) { each_or_twice<W>(width, f); };
        sources.ask(run[AHEAD].source);
        sources.read(run->source, [&](const auto* value) __attribute__((always_inline)) {
            each_lanes([&](auto d, auto) __attribute__((always_inline)) { sums[number_of<N>(d)] = get<N>(value + d); });
        });
        for (const Entry* entry = run + 1; entry < end; ++entry) {
            sources.ask(entry[AHEAD].source);
            sources.read(entry->source, [&](const auto* value) __attribute__((always_inline)) {
                each_lanes([&](auto d, auto) __attribute__((always_inline)) { sums[number_of<N>(d)] += get<N>(value + d); });
            });
        }
        each_lanes([&](auto d, auto) __attribute__((always_inline)) { put<N>(sum + d, sums[number_of<N>(d)]); });
    }
}

// Where the rows of one weight are, and what goes with them.
template <class Row, class S, class Weight>
struct Target {
    Row values;
    State<S> state;
    int64_t width;
    int64_t start;        // number of its first row among those of all weights, counted from the window's first one
    int64_t* rows;        // SPARSE_GRADIENT: where to note rows, from `next` on
    int64_t next;
    const Weight* weight;    // the rows themselves, which `values` are but for gradients,
    const float* strengths;  // and how strongly L2 pulls each of them, or null

    // Adds what L2 has to say of row `row`, of n scalars, to its gradient; of n rows of one scalar, where it is a block.
    template <int W>
    __attribute__((always_inline)) void pull(int64_t row, int64_t n, bool is_block, float* g) const {
        if (__builtin_expect(strengths == nullptr, 1)) return;
        const float* strength = strengths + row;
        const Weight* at = weight + row * (is_block ? 1 : n);
        if (is_block)
            each<W>(n, [&](int64_t d, auto m) { put<m>(g + d, get<m>(g + d) + get<m>(strength + d) * get<m>(at + d)); });
        else
            each<W>(n, [&](int64_t d, auto m) { put<m>(g + d, get<m>(g + d) + *strength * get<m>(at + d)); });
    }
};

// How many rows' gradients are added up before these rows are updated: how often a row occurs cannot be foreseen, and a
// processor that guesses wrong there would begin anew with what it has begun of updates.
constexpr size_t SUMS = 16;

// `runs`: where the occurrences of each of so many rows begin, as find_runs says; `sum` has room for SUMS of them.
template <int W, class Row, class T, class S, class Weight>
void update_rows(const Rule& rule, Target<Row, S, Weight>& target, const Entry* entries, const uint32_t* runs, size_t num_rows,
                 const Sources<T>& sources, float* sum) {
    const int64_t width = fixed<W>(target.width);
    const bool sparse = rule.kind == SPARSE_GRADIENT;
    auto ask = [&](int64_t row) __attribute__((always_inline)) {
        if (!sparse) {
            const char* w = bytes_at(target.values + row * width);
            for (int64_t at = 0; at < width * scalar_bytes<Row>; at += 64) __builtin_prefetch(w + at, 1);
        }
        target.state.each_tensor(rule, width, [&](const S* values, int64_t columns) __attribute__((always_inline)) {
            if (!values) return;
            const char* first = reinterpret_cast<const char*>(values + row * columns);
            for (int64_t at = 0; at < columns * static_cast<int64_t>(sizeof(S)); at += 64) __builtin_prefetch(first + at, 1);
        });
        if (target.strengths) __builtin_prefetch(target.strengths + row);
    };
    for (size_t first = 0; first < num_rows; first += SUMS) {
        const size_t last = std::min(num_rows, first + SUMS);
        float* own = sum;
        for (size_t r = first; r < last; ++r, own += width) {
            if (r + AHEAD < num_rows) ask(entries[runs[r + AHEAD]].row - target.start);
            sum_run<W>(entries + runs[r], entries + runs[r + 1], sources, width, own);
        }
        own = sum;
        for (size_t r = first; r < last; ++r, own += width) {
            const int64_t row = entries[runs[r]].row - target.start;
            const int64_t to = sparse ? target.next++ : row;
            if (sparse) target.rows[to] = row;
            target.template pull<W>(row, width, false, own);
            update_row<W>(rule, target.values + to * width, target.state.at(rule, row, width), own, width);
        }
    }
}

template <class S>
inline void prefetch(const S* values, int64_t at, int64_t count);
inline void prefetch(Rounded values, int64_t at, int64_t count) { prefetch(values.at, at, count); }

template <class S>
inline void prefetch(const S* values, int64_t at, int64_t count) {
    if (!values) return;
    const char* first = reinterpret_cast<const char*>(values + at);
    const char* last = first + count * static_cast<int64_t>(sizeof(S)) - 1;
    for (const char* line = first; line < last; line += 64) __builtin_prefetch(line, 1);
    __builtin_prefetch(last, 1);
}

// Blocks of scalars: maximal chains of stretches that overlap are added up as a whole, then updated as a whole, as many at
// a time as rows are. No chain is longer than a region.
template <class Row, class T, class S, class Weight>
void update_stretches(const Rule& rule, Target<Row, S, Weight>& target, Workspace& work, const Stretch* entry,
                      const Stretch* end, const Sources<T>& sources) {
    struct {
        int64_t scalar, length;
    } chains[SUMS];
    size_t num_chains = 0;
    constexpr int64_t size = 2 << REGION_BITS;
    work.sum.reserve(size);
    float *const sums = work.sum.data.get(), *next = sums;
    auto update = [&] {
        float* sum = sums;
        for (size_t c = 0; c < num_chains; ++c) {
            const auto [scalar, length] = chains[c];
            const int64_t to = target.rows ? target.next : scalar;
            for (int64_t i = 0; target.rows && i < length; ++i) target.rows[target.next++] = scalar + i;
            const State<S> state = target.rows ? target.state : target.state.at(rule, scalar, 1);
            with_dim<T>(length, [&](auto w) {
                target.template pull<w>(scalar, length, true, sum);
                update_row<w>(rule, target.values + to, state, sum, length, true);
            });
            sum += length;
        }
        num_chains = 0, next = sums;
    };
    auto add = [&](const Stretch& stretch, float* to) {
        sources.read(stretch.source, [&](const auto* from) {
            each<0>(stretch.length, [&](int64_t d, auto n) { put<n>(to + d, get<n>(to + d) + get<n>(from + d)); });
        });
    };
    while (entry < end) {
        const uint64_t first = entry->row;
        uint64_t stop = first;
        const Stretch* chain = entry;
        bool one_place = true;
        for (; entry < end && (entry == chain || entry->row < stop); ++entry) {
            if (entry + AHEAD < end) {
                const Stretch& later = entry[AHEAD];
                const int64_t at = later.row - target.start;
                if (!target.rows) prefetch(target.values, at, later.length);
                target.state.each_tensor(rule, 1, [&](const S* values, int64_t) { prefetch(values, at, later.length); });
                sources.ask(later.source);
            }
            one_place &= entry->row == first;
            stop = std::max(stop, static_cast<uint64_t>(entry->row) + entry->length);
        }
        const int64_t length = static_cast<int64_t>(stop - first);
        if (num_chains == SUMS || next + length > sums + size) update();
        chains[num_chains++] = {static_cast<int64_t>(first) - target.start, length};
        if (entry == chain + 1) {  // the rule, and fast
            sources.read(chain->source, [&](const auto* from) {
                with_dim<T>(length, [&](auto w) {
                    each<w>(length, [&](int64_t d, auto n) { put<n>(next + d, get<n>(from + d)); });
                });
            });
        } else {
            for (int64_t i = 0; i < length; ++i) next[i] = 0;
            if (one_place) {
                for (const Stretch* e = chain; e < entry; ++e) add(*e, next);
            } else {
                // One order for all the stretches of a scalar: that of their sources.
                work.order.assign(chain, entry);
                std::sort(work.order.begin(), work.order.end(), [](const Stretch& a, const Stretch& b) {
                    return a.source != b.source ? a.source < b.source : a.row < b.row;
                });
                for (const Stretch& stretch : work.order) add(stretch, next + (stretch.row - first));
            }
        }
        next += length;
    }
    update();
}

// ---- backward ------------------------------------------------------------------------------------------------------

// How a lookup's gradient reaches its rows: slices of the output's as they are (DIRECT), slices of it divided, once for
// each bag (DIVIDED), or values made from it for each id (MADE).
enum Way { DIRECT, DIVIDED, MADE };

struct Flow {
    Way way;
    int64_t own_start, own_stride;  // of what is made for each id, or bag
    int64_t num_ids;
};

inline bool takes_slices(const Program& program, const Lookup& lookup) {
    if (lookup.projection >= 0 || lookup.operation == MULT || lookup.operation == MEAN || lookup.operation == LIST_MEAN)
        return false;
    for (int64_t c = 0; c < lookup.num_pieces; ++c) {
        const Piece& piece = program.pieces[lookup.first_piece + c];
        if (piece.has_sign || piece.projection >= 0) return false;
    }
    return true;
}

inline bool divides(const Call& call, int64_t l) { return call.offsets && call.outputs[l].pooling == POOL_MEAN; }

inline Way way_of(const Program& program, const Call& call, int64_t l) {
    const Lookup& lookup = program.lookups[l];
    if (lookup.num_pieces == 0) return DIRECT;
    if (call.id_weights || !takes_slices(program, lookup)) return MADE;
    if (lookup.rest >= 0 && !takes_slices(program, program.lookups[lookup.rest])) return MADE;
    return divides(call, l) ? DIVIDED : DIRECT;
}

// The rows of a lookup whose gradients are slices of the output's: of a direct one all, of alternatives those of the first
// where it has no projection.
inline Span sliced_rows(const Program& program, const Call& call, int64_t l, Way way) {
    if (way == DIRECT) return {0, INT64_MAX};
    const Lookup& lookup = program.lookups[l];
    const Piece& piece = program.pieces[lookup.first_piece];
    if (lookup.operation != MIXED || piece.projection >= 0 || call.id_weights || divides(call, l)) return {0, 0};
    return rows_of_slab(program, piece);
}

// Where the gradient of row c lies among an id's own values: all rows of a list have the same one.
inline int64_t gradient_column(const Program& program, const Lookup& lookup, int64_t c) {
    return is_list(lookup) ? 0 : own_column(program, lookup, c);
}

// The piece of row c of an id.
inline const Piece& piece_at(const Program& program, const Lookup& lookup, int64_t c) {
    return program.pieces[lookup.first_piece + (is_list(lookup) ? 0 : c)];
}

inline bool is_trained(const Program& program, int64_t projection) {
    return projection >= 0 && program.projections[projection].trained;
}

// Whether what is behind the combination has a gradient itself, which depends on the combination.
inline bool trains_projections(const Program& program, const Lookup& lookup) {
    return is_trained(program, lookup.projection) || is_trained(program, lookup.inner_projection);
}

// Whether the gradient depends on what the rows are.
inline bool reads_rows(const Program& program, const Lookup& lookup) {
    if (lookup.operation == MULT || trains_projections(program, lookup)) return true;
    for (int64_t c = 0; c < lookup.num_pieces; ++c)
        if (is_trained(program, program.pieces[lookup.first_piece + c].projection)) return true;
    return lookup.rest >= 0 && reads_rows(program, program.lookups[lookup.rest]);
}

// Examples whose gradients of the projections are added up by themselves first: the same for any number of threads.
constexpr int64_t CHUNK = 512;

// Asks for rows that will be read.
template <class T>
inline void prefetch_rows(const Program& program, const Call& call, const Lookup& lookup, const int64_t* rows) {
    if (rows[0] < 0) return;
    const Lookup& by = looked_up_by(program, lookup, rows[0]);
    for (int64_t c = 0; c < by.num_rows && rows[c] >= 0; ++c) {
        int64_t w = piece_at(program, by, c).weight;
        if (by.operation == MIXED) {
            w = 0;
            for (int64_t k = 1; k < program.num_weights; ++k) w += rows[0] >= program.weights[k].start;
        }
        const Weight& weight = program.weights[w];
        const int64_t bytes = weight.format == PLAIN ? weight.width * static_cast<int64_t>(sizeof(T)) : weight.unit_bytes;
        __builtin_prefetch(static_cast<const char*>(call.weights[w]) + (rows[c] - weight.start) * bytes);
    }
}

// Gradients of the rows of up to BLOCK_OF_IDS ids with alternatives, but for those of the rest; whether that was possible:
// it begins with nothing that it cannot finish.
template <int D>
bool own_of_alternatives(const Program& program, const Call& call, const Lookup& lookup, const int64_t* rows,
                         int64_t row_stride, int64_t n, const float* gradient, int64_t stride, float* own,
                         int64_t own_stride, const Span& sliced, float* const* projection_sums) {
    if constexpr (!has_narrow_rows<D>) {
        return false;
    } else {
        for (int64_t c = 0; c < lookup.num_pieces; ++c) {
            const Piece& piece = program.pieces[lookup.first_piece + c];
            if (is_trained(program, piece.projection) && program.weights[piece.weight].format != PLAIN) return false;
        }
        int64_t left[BLOCK_OF_IDS];
        by_alternative(program, lookup, rows, row_stride, n, left, [&](const Piece& piece, const int64_t* index,
                                                                       const int64_t* found, int64_t count) {
            if (piece.projection < 0) {
                if (sliced.holds(found[0])) return;  // as it holds all of these
                for (int64_t k = 0; k < count; ++k)
                    std::memcpy(own + index[k] * own_stride, gradient + index[k] * stride, D * sizeof(float));
                return;
            }
            const int64_t start = program.weights[piece.weight].start;
            const float* values = static_cast<const float*>(call.weights[piece.weight]);
            for (int64_t k = 0; k < count; ++k) __builtin_prefetch(gradient + index[k] * stride);
            if (is_trained(program, piece.projection))
                for (int64_t k = 0; k < count; ++k)
                    __builtin_prefetch(values + (found[k] - start) * piece.width);
            project_back<D>(values, start, piece.width, static_cast<const float*>(call.projections[piece.projection]), index,
                            found, count, gradient, stride, own, own_stride, projection_sums[piece.projection]);
        });
        return true;
    }
}

// How many values an id has: room for its rows too, where a gradient that depends on them may have to keep them.
inline int64_t own_stride_of(const Program& program, const Lookup& lookup) {
    if (lookup.operation == MIXED) {
        int64_t most = lookup.rest < 0 ? lookup.inner : std::max(lookup.inner, own_stride_of(program, program.lookups[lookup.rest]));
        // Before their projection rows may be wider than the vectors.
        for (int64_t c = 0; c < lookup.num_pieces; ++c) most = std::max(most, program.pieces[lookup.first_piece + c].width);
        return most;
    }
    const bool one = lookup.operation == CONCAT || (is_list(lookup) && !reads_rows(program, lookup));
    return one ? lookup.inner : lookup.num_rows * lookup.inner;
}

// The flows of all lookups; the number of values that are made.
inline int64_t find_flows(const Program& program, const Call& call, std::vector<Flow>& flows) {
    int64_t own_size = 0;
    flows.resize(program.num_lookups);
    for (int64_t l = 0; l < program.num_lookups; ++l) {
        const Lookup& lookup = program.lookups[l];
        int64_t first = 0, last = call.batch;
        ids_of_bags(call, lookup, first, last);
        Flow& flow = flows[l];
        flow = {way_of(program, call, l), own_size, 0, last - first};
        if (flow.way == DIRECT) continue;
        flow.own_stride = flow.way == DIVIDED ? lookup.dim : own_stride_of(program, lookup);
        own_size += (flow.way == DIVIDED ? call.batch : flow.num_ids) * flow.own_stride;
    }
    return own_size;
}

// Rows for a backward pass that will find other values in the weights; they lie as the values made from them will.
template <class T>
int64_t keep_rows(const Call& call) {
    const Program program(call.program);
    std::vector<int64_t> starts(program.num_lookups + 1);
    row_starts(program, call, starts.data());
    std::vector<Flow> flows;
    const int64_t size = find_flows(program, call, flows);
    for (int64_t l = 0; call.saved && l < program.num_lookups; ++l) {
        const Lookup& lookup = program.lookups[l];
        if (flows[l].way != MADE || !reads_rows(program, lookup)) continue;
        const Place place = place_of(program, call, l, starts.data());
        for (int64_t i = 0; i < flows[l].num_ids; ++i) {
            const int64_t* rows = call.rows + place.rows + i * place.row_stride;
            T* to = static_cast<T*>(call.saved) + flows[l].own_start + i * flows[l].own_stride;
            const Lookup& by = looked_up_by(program, lookup, rows[0]);
            if (!reads_rows(program, by)) continue;
            for (int64_t c = 0; c < by.num_rows && rows[c] >= 0; ++c) {
                const Piece& piece = by.operation == MIXED ? alternative_of(program, by, rows[0]) : piece_at(program, by, c);
                T* own = to + own_column(program, by, c);
                if constexpr (std::is_same<T, float>::value) {
                    if (program.weights[piece.weight].format != PLAIN) {
                        unpack(program, call, piece, rows[c], own);
                        continue;
                    }
                }
                std::memcpy(own, row_of<T>(program, call, piece.weight, rows[c]), piece.width * sizeof(T));
            }
        }
    }
    return size;
}

// The gradients of an id's rows, `to`, from that of their combination, g [inner]; `product` has room for as many, and
// `room` for two rows that are unpacked. `id_place`: where the id lies, from which signs are hashed; `saved`: as for
// `combine`.
template <class T, int D>
__attribute__((always_inline)) inline void spread(const Program& program, const Call& call, const Lookup& lookup,
                                                  const int64_t* rows, int64_t id_place, const T* saved, const float* g,
                                                  float* to, float* product, float* room) {
    const int64_t dim = fixed<D>(lookup.inner);
    const Piece* pieces = program.pieces + lookup.first_piece;
    auto row_at = [&](const Piece& piece, int64_t c) {
        float* own = room + (c & 1) * piece.width;
        return saved ? saved + own_column(program, lookup, c) : row_in<T>(program, call, piece, rows[c], own);
    };
    switch (lookup.operation) {
        case CONCAT:
            each<D>(dim, [&](int64_t d, auto n) { put<n>(to + d, get<n>(g + d)); });
            for (int64_t c = 0; c < lookup.num_pieces; ++c) {
                if (!pieces[c].has_sign) continue;
                const float sign = hash_sign(taken(lookup, id_at(call, id_place)), pieces[c].sign_seed);
                for (int64_t d = 0; d < pieces[c].width; ++d) to[pieces[c].column + d] *= sign;
            }
            break;
        case SUM:
        case MEAN:
            for (int64_t c = 0; c < lookup.num_pieces; ++c) {
                float sign = pieces[c].has_sign ? hash_sign(taken(lookup, id_at(call, id_place)), pieces[c].sign_seed) : 1.0f;
                if (lookup.operation == MEAN) sign /= static_cast<float>(lookup.num_pieces);
                each<D>(dim, [&](int64_t d, auto n) { put<n>(to + c * dim + d, sign * get<n>(g + d)); });
            }
            break;
        case MULT: {
            if (lookup.num_pieces == 2) {
                const T* one = row_at(pieces[0], 0);
                const T* two = row_at(pieces[1], 1);
                each<D>(dim, [&](int64_t d, auto n) {
                    put<n>(to + d, get<n>(g + d) * get<n>(two + d));
                    put<n>(to + dim + d, get<n>(g + d) * get<n>(one + d));
                });
                break;
            }
            // The product of all others: of those before on the way there, of those behind on the way back.
            for (int64_t d = 0; d < dim; ++d) product[d] = g[d];
            for (int64_t c = 0; c < lookup.num_pieces; ++c) {
                const T* row = row_at(pieces[c], c);
                each<D>(dim, [&](int64_t d, auto n) {
                    put<n>(to + c * dim + d, get<n>(product + d));
                    put<n>(product + d, get<n>(product + d) * get<n>(row + d));
                });
            }
            for (int64_t d = 0; d < dim; ++d) product[d] = 1;
            for (int64_t c = lookup.num_pieces - 1; c >= 0; --c) {
                const T* row = row_at(pieces[c], c);
                each<D>(dim, [&](int64_t d, auto n) {
                    put<n>(to + c * dim + d, get<n>(to + c * dim + d) * get<n>(product + d));
                    put<n>(product + d, get<n>(product + d) * get<n>(row + d));
                });
            }
            break;
        }
        default: {  // LIST_SUM, LIST_MEAN
            const float divisor = lookup.operation == LIST_MEAN ? static_cast<float>(list_length(lookup, rows)) : 1.0f;
            each<D>(dim, [&](int64_t d, auto n) { put<n>(to + d, get<n>(g + d) / divisor); });
        }
    }
}

// The same where the combination is not the whole vector: of any width, so that it is compiled once.
template <class T>
__attribute__((noinline)) void spread_inner(const Program& program, const Call& call, const Lookup& lookup,
                                            const int64_t* rows, int64_t id_place, const T* saved, const float* g,
                                            float* to, float* product, float* room) {
    with_dim<T>(lookup.inner, [&](auto width) {
        spread<T, width.value>(program, call, lookup, rows, id_place, saved, g, to, product, room);
    });
}

// to [width]: the gradient of `row` from that of row · projection, g [dim]; `total` takes the projection's. Where it is
// null nobody asks for that one, and `row` is not read.
template <class T, int D, class Row>
inline void project_one_back(const T* projection, const Row* row, int64_t width, int64_t dim, const float* g, float* to,
                             float* total) {
    for (int64_t j = 0; j < width; ++j) {
        to[j] = dot<D>(g, projection + j * dim, dim);
        if (!total) continue;
        const float value = load(row + j);
        each<D>(dim, [&](int64_t d, auto n) {
            put<n>(total + j * dim + d, get<n>(total + j * dim + d) + value * get<n>(g + d));
        });
    }
}

// The values that rows take where they are no slices of the gradient, for the ids of bags [first, last). `projection_sums`
// is null for a projection that is not trained.
template <class T, int D>
void make_own(const Program& program, const Call& call, int64_t l, const Place& place, const Flow& flow, int64_t first,
              int64_t last, float* own, float* scratch, float* room, float* const* projection_sums) {
    const Lookup& lookup = program.lookups[l];
    const Output& output = call.outputs[l];
    const int64_t dim = fixed<D>(lookup.dim);
    const T* gradient = static_cast<const T*>(call.values) + output.start;
    const float* id_weights = call.id_weights ? call.id_weights + place.first_id : nullptr;
    const bool pools = call.offsets && output.pooling != NONE;
    float* g = scratch;
    float* product = scratch + dim;
    const bool reads = reads_rows(program, lookup);
    const Span sliced = sliced_rows(program, call, l, flow.way);
    if (flow.way == DIVIDED) {
        for (int64_t b = first; b < last; ++b) {
            int64_t begin = b, end = b + 1;
            ids_of_bags(call, lookup, begin, end);
            const float divisor = divisor_of(lookup, output, call.rows + place.rows + begin * place.row_stride, place.row_stride,
                                             end - begin);
            const T* from = gradient + b * output.stride;
            float* to = own + flow.own_start + b * flow.own_stride;
            each<D>(dim, [&](int64_t d, auto n) { put<n>(to + d, get<n>(from + d) / divisor); });
        }
        return;
    }
    bool alternatives = false;  // whose values are made already
    if constexpr (std::is_same<T, float>::value) {
        alternatives = lookup.operation == MIXED && !pools && !id_weights && !call.saved;
        int64_t begin = first, end = last;
        ids_of_bags(call, lookup, begin, end);
        for (int64_t i = begin; alternatives && i < end; i += BLOCK_OF_IDS)
            alternatives = own_of_alternatives<D>(program, call, lookup, call.rows + place.rows + i * place.row_stride,
                                                  place.row_stride, std::min(BLOCK_OF_IDS, end - i),
                                                  gradient + i * output.stride, output.stride,
                                                  own + flow.own_start + i * flow.own_stride, flow.own_stride, sliced,
                                                  projection_sums);
        if (alternatives && lookup.rest < 0) return;
    }
    for (int64_t b = first; b < last; ++b) {
        int64_t begin = b, end = b + 1;
        ids_of_bags(call, lookup, begin, end);
        const int64_t* rows = call.rows + place.rows + begin * place.row_stride;
        const float divisor = pools ? divisor_of(lookup, output, rows, place.row_stride, end - begin) : 1.0f;
        for (int64_t i = begin; i < end; ++i, rows += place.row_stride) {
            if (reads && i + AHEAD < place.num_ids) prefetch_rows<T>(program, call, lookup, rows + AHEAD * place.row_stride);
            if (rows[0] < 0 || sliced.holds(rows[0])) continue;
            const Lookup& by = looked_up_by(program, lookup, rows[0]);
            if (alternatives && &by == &lookup) continue;
            const int64_t at = i * place.stride;
            const T* from = gradient + (pools ? b : i) * output.stride;
            __builtin_prefetch(from + AHEAD * output.stride);
            const float factor = id_weights ? id_weights[at] : 1.0f;
            each<D>(dim, [&](int64_t d, auto n) { put<n>(g + d, get<n>(from + d) / divisor * factor); });
            float* to = own + flow.own_start + i * flow.own_stride;
            const T* saved = call.saved ? static_cast<const T*>(call.saved) + flow.own_start + i * flow.own_stride : nullptr;
            const int64_t id_place = place.first_id + at;
            if (by.projection >= 0) {
                float* u = scratch + 2 * dim;
                float* u_gradient = u + by.inner;
                if (trains_projections(program, by))
                    combine_inner<T>(program, call, by, rows, taken(lookup, id_at(call, id_place)), saved, u, room);
                const T* projection = static_cast<const T*>(call.projections[by.projection]);
                if (by.inner_projection < 0) {
                    project_one_back<T, D>(projection, u, by.inner, dim, g, u_gradient, projection_sums[by.projection]);
                } else {
                    const T* first = static_cast<const T*>(call.projections[by.inner_projection]);
                    float* middle = u_gradient + 2 * by.inner;
                    float* middle_gradient = middle + by.middle;
                    if (is_trained(program, by.projection)) project_one<T, 0>(first, u, by.inner, by.middle, middle);
                    project_one_back<T, D>(projection, middle, by.middle, dim, g, middle_gradient,
                                           projection_sums[by.projection]);
                    project_one_back<T, 0>(first, u, by.inner, by.middle, middle_gradient, u_gradient,
                                           projection_sums[by.inner_projection]);
                }
                spread_inner<T>(program, call, by, rows, id_place, saved, u_gradient, to, u_gradient + by.inner, room);
            } else if (by.operation == MIXED) {
                const Piece& piece = alternative_of(program, by, rows[0]);
                if (piece.projection < 0) {
                    each<D>(dim, [&](int64_t d, auto n) { put<n>(to + d, get<n>(g + d)); });
                    continue;
                }
                const T* row = saved || !reads ? saved : row_in<T>(program, call, piece, rows[0], room);
                project_one_back<T, D>(static_cast<const T*>(call.projections[piece.projection]), row, piece.width, dim, g, to,
                                       projection_sums[piece.projection]);
            } else if (zeros_follow(by)) {
                spread_inner<T>(program, call, by, rows, id_place, saved, g, to, product, room);
            } else {
                spread<T, D>(program, call, by, rows, id_place, saved, g, to, product, room);
            }
        }
    }
}

// Takes down the occurrences of rows that belong to a part of the work, of a window.
struct Notes {
    const Program& program;
    uint64_t window, part, parts;
    Entry* rows;
    Stretch* stretches;

    static uint32_t within(uint64_t row) { return static_cast<uint32_t>(row & ((uint64_t{1} << ROW_BITS) - 1)); }

    // `place`: by which rows, or regions, are dealt out.
    __attribute__((always_inline)) bool takes(uint64_t row, uint64_t place) const {
        return (row >> ROW_BITS == window) & belongs(place, part, parts);
    }

    // One below 0 is in no window.
    __attribute__((always_inline)) void add(uint64_t row, uint64_t source) {
        // Written in any case and then counted or not: whose a row is cannot be foreseen.
        *rows = {within(row), static_cast<uint32_t>(source)};
        rows += takes(row, row >> LINE_BITS);
    }

    void add_stretch(uint64_t row, uint64_t source, int64_t length) {
        *stretches = {within(row), static_cast<uint32_t>(source), static_cast<uint32_t>(length)};
        stretches += takes(row, row >> REGION_BITS);
    }

    // A block's stretches: it is cut where its slab ends, where it goes on from the slab's beginning, and where regions end.
    __attribute__((noinline)) void add_block(const Piece& piece, uint64_t row, uint64_t source) {
        const uint64_t start = static_cast<uint64_t>(program.weights[piece.weight].start + piece.base);
        const uint64_t end = start + static_cast<uint64_t>(piece.b), last = row + static_cast<uint64_t>(piece.width) - 1;
        if ((row ^ last) >> REGION_BITS == 0 && last < end) return add_stretch(row, source, piece.width);  // nearly always
        for (int64_t left = piece.width; left > 0;) {
            const uint64_t region = ((row >> REGION_BITS) + 1) << REGION_BITS;
            const int64_t length = std::min<int64_t>(left, static_cast<int64_t>(std::min(region, end) - row));
            add_stretch(row, source, length);
            left -= length, source += static_cast<uint64_t>(length), row += static_cast<uint64_t>(length);
            if (row == end) row = start;
        }
    }
};

// What repeats from id to id: where the gradients of those at one address of a lookup lie.
struct Slot {
    const Piece* block;          // or null
    const Lookup* alternatives;  // of a block: one of which, with a row of its own, it may be instead; or null
    Span sliced;
    uint64_t slice, slice_stride, own, own_stride;

    __attribute__((always_inline)) uint64_t source(int64_t row, int64_t slice_at, int64_t own_at) const {
        return sliced.holds(row) ? slice + static_cast<uint64_t>(slice_at) * slice_stride
                                 : own + static_cast<uint64_t>(own_at) * own_stride;
    }

    __attribute__((always_inline)) void note(Notes& notes, int64_t row, int64_t slice_at, int64_t own_at) const {
        if (row < 0) return;
        const bool is_row = !block || (alternatives && &looked_up_by(notes.program, *alternatives, row) == alternatives);
        const uint64_t from = source(row, slice_at, own_at);
        is_row ? notes.add(static_cast<uint64_t>(row), from) : notes.add_block(*block, static_cast<uint64_t>(row), from);
    }
};

// Appends the slots of a lookup. `own_from`: as in Sources.
inline void add_slots(const Program& program, const Call& call, int64_t l, const Flow& flow, uint64_t own_from,
                      std::vector<Slot>& slots) {
    const Lookup& lookup = program.lookups[l];
    const Output& output = call.outputs[l];
    const Lookup& by = with_addresses(program, lookup);
    for (int64_t c = 0; c < lookup.num_rows; ++c) {
        const Piece& piece = piece_at(program, by, c);
        const int64_t column = by.operation == CONCAT ? piece.column : 0;
        const int64_t own = flow.own_start + (flow.way == DIVIDED ? column : gradient_column(program, by, c));
        slots.push_back({piece.is_block() ? &piece : nullptr, lookup.rest >= 0 ? &lookup : nullptr,
                         sliced_rows(program, call, l, flow.way), static_cast<uint64_t>(output.start + column),
                         static_cast<uint64_t>(output.stride), own_from + static_cast<uint64_t>(own),
                         static_cast<uint64_t>(flow.own_stride)});
    }
}

template <class T, class S>
struct Update {
    const Call& call;    // where results go,
    const Call& source;  // and what was looked up
    const Program& program;
    const Rule rule;
    std::vector<Workspace>& works;
    const Sources<T> sources;
    int64_t window;

    int64_t first_row() const { return window << ROW_BITS; }

    // Calls f with the target of a weight whose distinct rows begin at next[w] of its sparse gradient.
    template <class F>
    void with_target(int64_t w, int64_t* next, const F& f) const {
        const bool updates = rule.kind < DENSE_GRADIENT, stateful = updates && call.states;
        const Weight& weight = program.weights[w];
        auto run = [&](auto values, auto* read) {
            Target<decltype(values), S, std::remove_pointer_t<decltype(read)>> target{
                values, State<S>(stateful ? call.states : nullptr, w), weight.width, weight.start - first_row(),
                rule.kind == SPARSE_GRADIENT ? call.gradient_rows[w] : nullptr, next ? next[w] : 0,
                read, source.strengths ? source.strengths[w] : nullptr};
            f(target);
            if (next) next[w] = target.next;
        };
        T* values = static_cast<T*>(call.weights[w]);
        if constexpr (std::is_same<T, float>::value) {
            if (weight.format == BRAINS) {
                bfloat16* rows = static_cast<bfloat16*>(source.weights[w]);
                return updates ? run(Rounded{rows, 0, stream_of(call.step, weight.width)}, rows) : run(values, rows);
            }
        }
        run(values, static_cast<T*>(source.weights[w]));
    }

    // Distinct rows (scalars) of each weight in a part's sorted lists, for SPARSE_GRADIENT.
    void count(int64_t part, int64_t* counts) const {
        each_weight(works[part].rows, [&](int64_t w, const Entry* e, const Entry* end) {
            for (const Entry* at = e; at < end; ++at) counts[w] += at == e || at->row != at[-1].row;
        });
        each_weight(works[part].stretches, [&](int64_t w, const Stretch* e, const Stretch* end) {
            uint64_t covered = 0;
            for (; e < end; ++e) {
                const uint64_t row = e->row, stop = row + e->length;
                if (stop > covered) counts[w] += static_cast<int64_t>(stop - std::max(covered, row));
                covered = std::max(covered, stop);
            }
        });
    }

    // Calls f(weight, entries, their end) for each weight that has some.
    template <class E, class F>
    void each_weight(const Sorted<E>& sorted, const F& f) const {
        const E *entry = sorted.begin(), *end = sorted.end();
        for (int64_t w = 0; w < program.num_weights && entry < end; ++w) {
            const int64_t stop = program.weights[w + 1].start - first_row();
            const E* next = std::lower_bound(entry, end, stop, [](const E& e, int64_t row) { return e.row < row; });
            if (next > entry) f(w, entry, next);
            entry = next;
        }
    }

    // Applies a part's updates; `next` is where its distinct rows begin in each weight's sparse gradient.
    void apply(int64_t part, int64_t* next) const {
        Workspace& work = works[part];
        each_weight(work.rows, [&](int64_t w, const Entry* e, const Entry* end) {
            const size_t num_rows = find_runs(e, end, work.runs);
            with_target(w, next, [&](auto& to) {
                work.sum.reserve(SUMS * static_cast<size_t>(to.width));
                with_width(to.width, [&](auto width) {
                    update_rows<width.value>(rule, to, e, work.runs.data.get(), num_rows, sources, work.sum.data.get());
                });
            });
        });
        each_weight(work.stretches, [&](int64_t w, const Stretch* e, const Stretch* end) {
            with_target(w, next, [&](auto& to) { update_stretches(rule, to, work, e, end, sources); });
        });
    }

    template <class F>
    static void with_width(int64_t width, const F& f) {
        if (width == 1) return f(std::integral_constant<int, 1>{});
        with_any_dim<T>(width, f);
    }

    void sort(int64_t part) const {
        const uint64_t bound = static_cast<uint64_t>(program.total_rows - first_row());
        works[part].rows.sort(bound);
        works[part].stretches.sort(bound);
    }

    // Sparse gradients of a window follow those of the windows before it.
    void run(int64_t parts, int64_t* num_gradient_rows) const {
        if (rule.kind != SPARSE_GRADIENT) {
            in_parallel(parts, [&](int64_t part) {
                sort(part);
                apply(part, nullptr);
            });
            return;
        }
        const size_t n = static_cast<size_t>(program.num_weights);
        std::vector<int64_t> counts(n * parts, 0);
        in_parallel(parts, [&](int64_t part) {
            sort(part);
            count(part, counts.data() + n * part);
        });
        for (size_t w = 0; w < n; ++w) {
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t own_rows = counts[n * part + w];
                counts[n * part + w] = num_gradient_rows[w];
                num_gradient_rows[w] += own_rows;
            }
        }
        in_parallel(parts, [&](int64_t part) { apply(part, counts.data() + n * part); });
    }
};

// Updates what `note` takes down of each part's share of the occurrences of rows, of which there are at most so many.
template <class T, class S, class Note>
void update_all(const Call& call, const Call& source, const Program& program, std::vector<Workspace>& works,
                const Sources<T>& sources, int64_t most_rows, int64_t most_stretches, int64_t parts, const Note& note) {
    if (works.size() < static_cast<size_t>(parts)) works.resize(parts);
    const int64_t windows = ((program.total_rows - 1) >> ROW_BITS) + 1;
    if (call.num_gradient_rows) std::fill_n(call.num_gradient_rows, program.num_weights, int64_t{0});
    for (int64_t window = 0; window < windows; ++window) {
        in_parallel(parts, [&](int64_t part) {
            // Bounds for any share of the rows: untouched pages cost nothing.
            Sorted<Entry>& rows = works[part].rows;
            Sorted<Stretch>& stretches = works[part].stretches;
            rows.reserve(most_rows + 1), stretches.reserve(most_stretches + 1);
            Notes notes{program, static_cast<uint64_t>(window), static_cast<uint64_t>(part), static_cast<uint64_t>(parts),
                        rows.entries.data.get(), stretches.entries.data.get()};
            note(notes);
            rows.entries.size = static_cast<size_t>(notes.rows - rows.begin());
            stretches.entries.size = static_cast<size_t>(notes.stretches - stretches.begin());
        });
        const Update<T, S> update{call, source, program, Rule(source), works, sources, window};
        update.run(parts, call.num_gradient_rows);
    }
}

// The calling thread's workspaces.
struct Kept {
    std::vector<Workspace> works;
    Buffer<float> own, projections;
};

inline Kept& kept() {
    static thread_local Kept kept;
    return kept;
}

// Adds up the gradients of the projections that are trained, and applies the rule to each of their rows.
template <class T, class S>
void update_projections(const Program& program, const Call& call, const Rule& rule, const float* sums, int64_t chunks,
                        int64_t chunk_size, const std::vector<int64_t>& starts) {
    std::vector<float> total(chunk_size);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < chunk_size; ++i) total[i] += sums[chunk * chunk_size + i];
    for (int64_t p = 0; p < program.num_projections; ++p) {
        const Projection& shape = program.projections[p];
        if (!shape.trained) continue;
        const bool stateful = rule.kind < DENSE_GRADIENT && call.projection_states;
        const State<S> state(stateful ? call.projection_states : nullptr, p);
        for (int64_t j = 0; j < shape.width; ++j)
            update_row<0>(rule, static_cast<T*>(call.projections[p]) + j * shape.dim, state.at(rule, j, shape.dim),
                          total.data() + starts[p] + j * shape.dim, shape.dim);
    }
}

// Throws std::bad_alloc for a batch of more occurrences of rows, or values of their gradients, than an entry can tell apart.
inline void refuse_more_than_fits(int64_t count) {
    if (count >= (int64_t{1} << 32) - AHEAD) throw std::bad_alloc();
}

template <class T, class S>
void backward(const Call& call, const Call& gradients) {
    // `gradients` is where results go: the weights themselves with a fused optimizer, tensors of gradients without.
    const Program program(call.program);
    std::vector<int64_t> starts(program.num_lookups + 1);
    row_starts(program, call, starts.data());
    Kept& keep = kept();

    // Which lookups need values of their own, and where those lie.
    std::vector<Flow> flows;
    const int64_t own_size = find_flows(program, call, flows);
    const bool any_own = own_size > 0;
    uint64_t own_from = 0;  // behind the output's gradient
    for (int64_t l = 0; l < program.num_lookups; ++l) {
        const Output& output = call.outputs[l];
        const int64_t vectors = call.offsets && output.pooling == NONE ? flows[l].num_ids : call.batch;
        if (vectors > 0)
            own_from = std::max(own_from, static_cast<uint64_t>(output.start + (vectors - 1) * output.stride + program.lookups[l].dim));
    }
    refuse_more_than_fits(static_cast<int64_t>(own_from) + own_size);
    std::vector<int64_t> projection_starts(program.num_projections + 1, 0);
    for (int64_t p = 0; p < program.num_projections; ++p) {
        const Projection& shape = program.projections[p];
        projection_starts[p + 1] = projection_starts[p] + (shape.trained ? shape.width * shape.dim : 0);
    }
    const int64_t chunk_size = projection_starts[program.num_projections];
    const int64_t chunks = (call.batch + CHUNK - 1) / CHUNK;
    keep.own.reserve(static_cast<size_t>(own_size));
    keep.projections.reserve(static_cast<size_t>(chunks * chunk_size));
    int64_t widest = 1;
    for (int64_t l = 0; l < program.num_lookups; ++l) widest = std::max(widest, program.lookups[l].dim);
    const int64_t scratch_size = 2 * widest + 3 * widest_inner(program);
    const int64_t room_size = 2 * widest_unpacked(program);
    if (any_own) {
        const int64_t parts = call.num_threads;
        in_parallel(parts, [&](int64_t part) {
            std::vector<float> scratch(scratch_size + room_size);
            std::vector<float*> sums(program.num_projections);
            for (int64_t chunk = chunks * part / parts; chunk < chunks * (part + 1) / parts; ++chunk) {
                float* chunk_sums = keep.projections.data.get() + chunk * chunk_size;
                for (int64_t i = 0; i < chunk_size; ++i) chunk_sums[i] = 0;
                for (int64_t p = 0; p < program.num_projections; ++p)
                    sums[p] = program.projections[p].trained ? chunk_sums + projection_starts[p] : nullptr;
                const int64_t end = std::min(call.batch, (chunk + 1) * CHUNK);
                for (int64_t first = chunk * CHUNK; first < end; first += BLOCK_OF_IDS) {
                    const int64_t last = std::min(end, first + BLOCK_OF_IDS);
                    for (int64_t l = 0; l < program.num_lookups; ++l) {
                        if (flows[l].way == DIRECT) continue;
                        const Place place = place_of(program, call, l, starts.data());
                        with_dim<T>(program.lookups[l].dim, [&](auto dim) {
                            make_own<T, dim.value>(program, call, l, place, flows[l], first, last, keep.own.data.get(),
                                                   scratch.data(), scratch.data() + scratch_size, sums.data());
                        });
                    }
                }
            }
        });
    }

    int64_t most_rows = 0, most_stretches = 0;
    for (int64_t l = 0; l < program.num_lookups; ++l) {
        const Lookup& lookup = program.lookups[l];
        if (lookup.rest >= 0) most_rows += flows[l].num_ids;
        const Lookup& by = with_addresses(program, lookup);
        for (int64_t c = 0; c < by.num_rows; ++c) {
            const Piece& p = piece_at(program, by, c);
            // A block is cut where the slab ends, a short slab being run through repeatedly, and at each end of a region,
            // of which every run may meet one however short it is.
            if (p.is_block())
                most_stretches += flows[l].num_ids * (2 * (2 + p.width / p.b) + (p.width >> REGION_BITS));
            else
                most_rows += flows[l].num_ids;
        }
    }
    refuse_more_than_fits(std::max(most_rows, most_stretches));
    const Sources<T> sources{static_cast<const T*>(call.values), keep.own.data.get(), static_cast<uint32_t>(own_from)};
    update_all<T, S>(gradients, call, program, keep.works, sources, most_rows, most_stretches, call.num_threads, [&](Notes& notes) {
        // Those of ids in order, first by example, with offsets by lookup.
        std::vector<Slot> slots;
        const int64_t* row = call.rows;
        if (call.offsets == nullptr) {
            for (int64_t l = 0; l < program.num_lookups; ++l) add_slots(program, call, l, flows[l], own_from, slots);
            for (int64_t b = 0; b < call.batch; ++b)
                for (const Slot& slot : slots) slot.note(notes, *row++, b, b);
            return;
        }
        for (int64_t l = 0; l < program.num_lookups; ++l) {
            slots.clear();
            add_slots(program, call, l, flows[l], own_from, slots);
            const bool pools = call.outputs[l].pooling != NONE, divided = flows[l].way == DIVIDED;
            const int64_t* offsets = call.offsets + program.lookups[l].column * call.batch;
            int64_t i = 0;
            if (slots.size() == 1 && !slots[0].block) {  // the rule, and fast
                Notes own = notes;
                const Slot only = slots[0];
                for (int64_t b = 0; b < call.batch; ++b)
                    for (const int64_t end = offsets[b + 1] - offsets[0]; i < end; ++i, ++row)
                        own.add(static_cast<uint64_t>(*row), only.source(*row, pools ? b : i, divided ? b : i));
                notes.rows = own.rows;
                continue;
            }
            for (int64_t b = 0; b < call.batch; ++b)
                for (const int64_t end = offsets[b + 1] - offsets[0]; i < end; ++i)
                    for (const Slot& slot : slots) slot.note(notes, *row++, pools ? b : i, divided ? b : i);
        }
    });
    if (chunk_size)
        update_projections<T, S>(program, gradients, Rule(call), keep.projections.data.get(), any_own ? chunks : 0, chunk_size, projection_starts);
}

// ---- from a call's types to template arguments ----------------------------------------------------------------------

inline Outcome run_forward(const Call& call) {
    switch (call.dtype) {
        case BFLOAT16: return forward<bfloat16>(call);
        case FLOAT16: return forward<float16>(call);
        default: return forward<float>(call);
    }
}

inline void run_backward(const Call& call, const Call& gradients) {
    const bool wide_state = call.state_dtype == FLOAT32;
    switch (call.dtype) {
        case BFLOAT16:
            return wide_state ? backward<bfloat16, float>(call, gradients) : backward<bfloat16, bfloat16>(call, gradients);
        case FLOAT16:
            return wide_state ? backward<float16, float>(call, gradients) : backward<float16, float16>(call, gradients);
        default: return backward<float, float>(call, gradients);
    }
}

inline int64_t run_keep_rows(const Call& call) {
    switch (call.dtype) {
        case BFLOAT16: return keep_rows<bfloat16>(call);
        case FLOAT16: return keep_rows<float16>(call);
        default: return keep_rows<float>(call);
    }
}

inline Outcome run_gather(const Gather& gather) {
    bool outside = false;
    for (int64_t i = 0; i < gather.num_ids; ++i)
        outside |= static_cast<uint64_t>(gather.rows[i]) >= static_cast<uint64_t>(gather.num_rows);
    if (outside) return NO_SUCH_ROW;
    const int64_t bytes = gather.row_bytes;
    const char* from = static_cast<const char*>(gather.weight);
    char* to = static_cast<char*>(gather.values);
    in_parallel(gather.num_threads, [&](int64_t part) {
        const int64_t first = gather.num_ids * part / gather.num_threads, last = gather.num_ids * (part + 1) / gather.num_threads;
        auto copy = [&](auto size) {
            const int64_t n = size.value ? size.value : bytes;
            for (int64_t i = first; i < last; ++i) {
                if (i + AHEAD < last)
                    for (int64_t at = 0; at < n; at += 64) __builtin_prefetch(from + gather.rows[i + AHEAD] * n + at);
                std::memcpy(to + i * n, from + gather.rows[i] * n, static_cast<size_t>(n));
            }
        };
        switch (bytes) {
            case 4: return copy(std::integral_constant<int, 4>{});
            case 8: return copy(std::integral_constant<int, 8>{});
            case 16: return copy(std::integral_constant<int, 16>{});
            case 32: return copy(std::integral_constant<int, 32>{});
            case 64: return copy(std::integral_constant<int, 64>{});
            case 128: return copy(std::integral_constant<int, 128>{});
            default: return copy(std::integral_constant<int, 0>{});
        }
    });
    return DONE;
}

// One weight and a list of rows: a program of one lookup that is given its addresses.
template <class T, class S>
void update_of(const RowUpdate& u) {
    const int64_t words[] = {1, 0, 0, 1, 0, 0, 0, /* Weight */ u.width, 0, u.format, 16, 0, 2 * u.width,
                             /* the end */ 0, u.num_rows, 0, 0, 0, 0};
    static_assert(sizeof words == (7 + 2 * sizeof(Weight) / 8) * 8, "a program of one weight");
    const Program program(words);
    void* weights[] = {u.weight};
    Call call{};
    call.weights = weights, call.states = u.states, call.rule = u.rule, call.hyper = u.hyper, call.num_hyper = u.num_hyper;
    call.step = u.step;
    refuse_more_than_fits(u.num_ids * u.width);
    const Sources<T> sources{static_cast<const T*>(u.gradient), nullptr, UINT32_MAX};
    update_all<T, S>(call, call, program, kept().works, sources, u.num_ids, 0, u.num_threads, [&](Notes& notes) {
        for (int64_t i = 0; i < u.num_ids; ++i)
            notes.add(static_cast<uint64_t>(u.rows[i]), static_cast<uint64_t>(i * u.width));
    });
}

inline Outcome run_update(const RowUpdate& u) {
    bool outside = false;
    for (int64_t i = 0; i < u.num_ids; ++i)
        outside |= static_cast<uint64_t>(u.rows[i]) >= static_cast<uint64_t>(u.num_rows);
    if (outside) return NO_SUCH_ROW;
    const bool wide_state = u.state_dtype == FLOAT32;
    switch (u.dtype) {
        case BFLOAT16: wide_state ? update_of<bfloat16, float>(u) : update_of<bfloat16, bfloat16>(u); break;
        case FLOAT16: wide_state ? update_of<float16, float>(u) : update_of<float16, float16>(u); break;
        default: update_of<float, float>(u);
    }
    return DONE;
}

}  // namespace EMBTABLES_INSTRUCTIONS
}  // namespace embtables

#define EMBTABLES_STRING(name) #name
#define EMBTABLES_FUNCTIONS(name)                                                                                \
    extern const Functions name##_functions;                                                                     \
    const Functions name##_functions{EMBTABLES_STRING(name), name::run_forward, name::run_backward, name::run_keep_rows, name::run_gather, \
                                     name::run_update};
