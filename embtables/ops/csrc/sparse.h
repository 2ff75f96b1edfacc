// Rows of a sparse matrix, of which some entries alone are stored. Included by kernels.h, in its namespace.
//
// The values are rows of one scalar each of the piece's weight, in any format, row by row of the matrix. Their columns are
// set bits of a bitmap, or stand in a code. The address of an id is that of the first value of its row, NOTHING where it has
// none. All codes may be damaged: a value that the weight does not have, or a column beyond the last, is left out.

// How many of the first bits are set, of fewer than 512.
inline int64_t set_before(const uint64_t* words, int64_t bits) {
    const int64_t last = bits >> 6;
    const uint64_t below = (uint64_t{1} << (bits & 63)) - 1;
    int64_t count = 0;
    // All eight words each time: which of them is the last cannot be foreseen.
#pragma GCC unroll 8
    for (int64_t k = 0; k < 8; ++k)
        count += __builtin_popcountll(words[k] & (k < last ? ~uint64_t{0} : k == last ? below : 0));
    return count;
}

// The n bits from one on, up to 64.
inline uint64_t bits_from(const uint64_t* words, int64_t first, int64_t n) {
    const int64_t shift = first & 63;
    uint64_t bits = words[first >> 6] >> shift;
    if (shift + n > 64) bits |= words[(first >> 6) + 1] << (64 - shift);
    return n < 64 ? bits & ((uint64_t{1} << n) - 1) : bits;
}

inline const uint64_t* bitmap_of(const Call& call, const Piece& piece) {
    return static_cast<const uint64_t*>(call.codes[piece.code]);
}

// Where the rows of n ids begin among the values, or a number that is no place of one.
inline void first_values(const Program& program, const Call& call, const Piece& piece, const int64_t* x, int64_t n,
                         int64_t* __restrict first) {
    const int64_t from = piece.a, dim = piece.width, size = piece.rows;
    with_code(program, call, piece.values, [&](auto* index) {
        switch (piece.kind) {
            case BITMAP: {
                const uint64_t* words = bitmap_of(call, piece);
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t bit = (from + x[i]) * dim;
                    __builtin_prefetch(words + (bit >> 6));
                    __builtin_prefetch(words + ((bit + dim - 1) >> 6));
                    __builtin_prefetch(index + (bit >> 9));
                }
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t bit = (from + x[i]) * dim, block = bit >> 9;
                    // Of a damaged directory the sum may be any number.
                    const uint64_t before = static_cast<uint64_t>(index[block]);
                    first[i] = static_cast<int64_t>(before + static_cast<uint64_t>(set_before(words + 8 * block, bit & 511)));
                }
                break;
            }
            case COMPRESSED:
                for (int64_t i = 0; i < n; ++i) __builtin_prefetch(index + from + x[i]);
                for (int64_t i = 0; i < n; ++i) first[i] = index[from + x[i]] < index[from + x[i] + 1] ? index[from + x[i]] : size;
                break;
            default: {  // a bisection for all ids at once: their reads do not wait for each other
                int64_t step = size > 0;
                while (step && step <= size / 2) step *= 2;
                for (int64_t i = 0; i < n; ++i) first[i] = 0;
                for (; step > 0; step /= 2)
                    for (int64_t i = 0; i < n; ++i) {
                        const int64_t further = first[i] + step;
                        const bool below = (further <= size) & (index[std::min(further, size) - 1] < from + x[i]);
                        first[i] = below ? further : first[i];
                    }
                for (int64_t i = 0; i < n; ++i)
                    if (first[i] < size && index[first[i]] != from + x[i]) first[i] = size;
            }
        }
    });
}

// The addresses of n ids, as `address`; what they lead to is asked for.
template <class T>
inline void address_sparse(const Program& program, const Call& call, const Lookup& lookup, const int64_t* x, int64_t n,
                           int64_t* rows, int64_t stride) {
    const Piece& piece = program.pieces[lookup.first_piece];
    const int64_t base = program.weights[piece.weight].start;
    int64_t first[BLOCK_OF_IDS];
    first_values(program, call, piece, x, n, first);
    with_rows<T, 1>(program, call, piece, [&](const auto& stored) {
        for (int64_t i = 0; i < n; ++i) {
            const bool pads = lookup.has_padding && x[i] == lookup.padding;
            const bool there = static_cast<uint64_t>(first[i]) < static_cast<uint64_t>(piece.rows);
            if (there) stored.ask(base + first[i]);
            rows[i * stride] = pads ? PADDING : there ? base + first[i] : NOTHING;
        }
    });
    if (piece.kind == BITMAP) return;
    with_code(program, call, piece.code, [&](auto* columns) {
        for (int64_t i = 0; i < n; ++i)
            if (rows[i * stride] >= 0) __builtin_prefetch(columns + first[i]);
    });
}

// The row of an id whose first value has this address: v [D].
template <class T>
__attribute__((noinline)) void sparse_row(const Program& program, const Call& call, const Piece& piece, int64_t address, int64_t id,
                                          float* __restrict v) {
    const int64_t row = piece.a + id, dim = piece.width, base = program.weights[piece.weight].start;
    std::memset(v, 0, static_cast<size_t>(dim) * sizeof(float));
    int64_t next = address - base;
    with_rows<T, 1>(program, call, piece, [&](const auto& stored) {
        auto take = [&](int64_t column) { stored.read(base + next++, [&](auto, auto, auto value) { v[column] = value; }); };
        if (piece.kind == BITMAP) {
            const uint64_t* words = bitmap_of(call, piece);
            for (int64_t column = 0; column < dim; column += 64) {
                uint64_t bits = bits_from(words, row * dim + column, std::min<int64_t>(64, dim - column));
                for (; bits && next < piece.rows; bits &= bits - 1) take(column + __builtin_ctzll(bits));
            }
            return;
        }
        with_code(program, call, piece.code, [&](auto* columns) {
            auto take_named = [&] {
                const uint64_t column = static_cast<uint64_t>(columns[next]);
                if (column < static_cast<uint64_t>(dim)) take(static_cast<int64_t>(column));
                else ++next;
            };
            with_code(program, call, piece.values, [&](auto* index) {
                if (piece.kind == COMPRESSED) {
                    const int64_t end = std::min<int64_t>(index[row + 1], piece.rows);
                    while (next < end) take_named();
                } else {
                    while (next < piece.rows && index[next] == row) take_named();
                }
            });
        });
    });
}
