// Rows of a sparse matrix, of which some entries alone are stored. Included by kernels.h, in its namespace.
//
// The values are rows of one scalar each of the piece's weight, in any format, row by row of the matrix. Their columns are
// set bits of a bitmap, or stand in a code. The address of an id is that of the first value of its row, NOTHING where it has
// none. All codes may be damaged: a value that the weight does not have, or a column beyond the last, is left out.

// How many of the first bits are set, of fewer than 512.
inline uint64_t set_before(const uint64_t* words, int64_t bits) {
    constexpr uint64_t all = ~uint64_t{0};
    static constexpr uint64_t whole[] = {all, all, all, all, all, all, all, 0, 0, 0, 0, 0, 0, 0};
    const int64_t last = bits >> 6;
    uint64_t count = __builtin_popcountll(words[last] & ((uint64_t{1} << (bits & 63)) - 1));
    // All words each time: how many of them are before the last one cannot be foreseen.
#pragma GCC unroll 7
    for (int64_t k = 0; k < 7; ++k) count += __builtin_popcountll(words[k] & whole[7 - last + k]);
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

// Where the rows of n ids begin among the values, or a number that is no place of one. `x`: the ids, whose first row is `from`.
template <class I>
inline void first_in_bitmap(const I* directory, const uint64_t* words, int64_t from, int64_t dim, const int64_t* x, int64_t n,
                            int64_t* __restrict first) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t bit = (from + x[i]) * dim;
        __builtin_prefetch(words + (bit >> 6));
        __builtin_prefetch(words + ((bit + dim - 1) >> 6));
        __builtin_prefetch(directory + (bit >> 9));
    }
    for (int64_t i = 0; i < n; ++i) {
        const int64_t bit = (from + x[i]) * dim, block = bit >> 9;
        // Of a damaged directory the sum may be any number.
        first[i] = static_cast<int64_t>(static_cast<uint64_t>(directory[block]) + set_before(words + 8 * block, bit & 511));
    }
}

template <class I>
inline void first_by_pointers(const I* pointers, int64_t from, int64_t size, const int64_t* x, int64_t n, int64_t* __restrict first) {
    for (int64_t i = 0; i < n; ++i) __builtin_prefetch(pointers + from + x[i]);
    for (int64_t i = 0; i < n; ++i) {
        const I begin = pointers[from + x[i]], end = pointers[from + x[i] + 1];
        first[i] = begin < end ? begin : size;
    }
}

template <class I>
inline void first_by_bisection(const I* rows, int64_t from, int64_t size, const int64_t* x, int64_t n, int64_t* __restrict first) {
    // For several ids at once: their reads do not wait for each other. Which half a row is in cannot be foreseen.
    constexpr int TOGETHER = 8;
    for (int64_t i = 0; i < n; i += TOGETHER) {
        int64_t row[TOGETHER], found[TOGETHER] = {};
        for (int k = 0; k < TOGETHER; ++k) row[k] = from + x[std::min(i + k, n - 1)];
        for (int64_t left = size; left > 0; left /= 2) {
            const int64_t half = (left + 1) / 2;
#pragma GCC unroll 8
            for (int k = 0; k < TOGETHER; ++k) found[k] += half & -static_cast<int64_t>(rows[found[k] + half - 1] < row[k]);
        }
        for (int k = 0; k < TOGETHER && i + k < n; ++k)
            first[i + k] = found[k] < size && rows[found[k]] == row[k] ? found[k] : size;
    }
}

inline void first_values(const Program& program, const Call& call, const Piece& piece, const int64_t* x, int64_t n, int64_t* first) {
    with_code(program, call, piece.values, [&](auto* index) {
        switch (piece.kind) {
            case BITMAP: return first_in_bitmap(index, bitmap_of(call, piece), piece.a, piece.width, x, n, first);
            case COMPRESSED: return first_by_pointers(index, piece.a, piece.rows, x, n, first);
            default: return first_by_bisection(index, piece.a, piece.rows, x, n, first);
        }
    });
}

// The addresses of n ids, as `address`; what they lead to is asked for.
template <class T>
inline void address_sparse(const Program& program, const Call& call, const Lookup& lookup, const int64_t* x, int64_t n,
                           int64_t* rows, int64_t stride) {
    const Piece& piece = program.pieces[lookup.first_piece];
    const int64_t base = program.weights[piece.weight].start;
    const int64_t most = std::min<int64_t>(piece.width, REGISTER) - 1;
    int64_t first[BLOCK_OF_IDS];
    first_values(program, call, piece, x, n, first);
    with_rows<T, 1>(program, call, piece, [&](const auto& stored) {
        for (int64_t i = 0; i < n; ++i) {
            const bool pads = lookup.has_padding && x[i] == lookup.padding;
            const bool there = static_cast<uint64_t>(first[i]) < static_cast<uint64_t>(piece.rows);
            // Vectors of them are read, across two lines as a rule.
            if (there) stored.ask(base + first[i]), stored.ask(base + std::min(first[i] + most, piece.rows - 1));
            rows[i * stride] = pads ? PADDING : there ? base + first[i] : NOTHING;
        }
    });
    if (piece.kind == BITMAP) return;
    with_code(program, call, piece.code, [&](auto* columns) {
        for (int64_t i = 0; i < n; ++i)
            if (rows[i * stride] >= 0) __builtin_prefetch(columns + first[i]);
    });
}

// Reads up to `most` values from one on: as many as there are.
template <class T>
__attribute__((noinline)) void some_values(const Program& program, const Call& call, const Piece& piece, int64_t first, int64_t most,
                                           float* values) {
    const int64_t end = std::min(most, piece.rows - first), base = program.weights[piece.weight].start;
    with_rows<T, 1>(program, call, piece, [&](const auto& stored) {
        for (int64_t k = 0; k < end; ++k) stored.read(base + first + k, [&](auto, auto, auto value) { values[k] = value; });
    });
}

// Each set bit takes the next of the values, and all others 0.
template <int N>
__attribute__((always_inline)) inline lanes<N> spread(uint64_t bits, lanes<N> values) {
    if constexpr (N == 1) {
        return bits ? values : 0;
#if defined(__AVX512F__)
    } else if constexpr (N == 16) {
        return bits_as<lanes<N>>(_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), bits_as<__m512>(values)));
    } else if constexpr (N == 8) {
        return bits_as<lanes<N>>(_mm256_maskz_expand_ps(static_cast<__mmask8>(bits), bits_as<__m256>(values)));
#elif defined(__AVX2__)
    } else if constexpr (N == 8) {
        const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101) * 0xff, numbers = _pdep_u64(0x0706050403020100, bytes);
        const __m256i which = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(numbers)));
        const __m256i is_set = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
        return bits_as<lanes<N>>(_mm256_and_si256(is_set, _mm256_permutevar8x32_epi32(bits_as<__m256i>(values), which)));
#endif
    } else {
        float next[N], all[N] = {};
        put<N>(next, values);
        for (int64_t k = 0; bits; bits &= bits - 1) all[__builtin_ctzll(bits)] = next[k++];
        return get<N>(all);
    }
}

// The row of an id of a matrix without a bitmap, whose first value is `next`: v [D].
template <class T>
__attribute__((noinline)) void named_columns(const Program& program, const Call& call, const Piece& piece, int64_t next, int64_t row,
                                             float* __restrict v) {
    const int64_t dim = piece.width, base = program.weights[piece.weight].start;
    std::memset(v, 0, static_cast<size_t>(dim) * sizeof(float));
    with_rows<T, 1>(program, call, piece, [&](const auto& stored) {
        with_code(program, call, piece.code, [&](auto* columns) {
            auto take = [&] {
                const uint64_t column = static_cast<uint64_t>(columns[next]);
                if (column < static_cast<uint64_t>(dim)) stored.read(base + next, [&](auto, auto, auto value) { v[column] = value; });
                ++next;
            };
            with_code(program, call, piece.values, [&](auto* index) {
                if (piece.kind == COMPRESSED) {
                    for (const int64_t end = std::min<int64_t>(index[row + 1], piece.rows); next < end;) take();
                } else {
                    while (next < piece.rows && index[next] == row) take();
                }
            });
        });
    });
}

// The rows of ids: read(i, f) as in stored.h, for number i of them.
template <class T, int D>
struct SparseVectors {
    static constexpr int LANES = D < REGISTER ? D : REGISTER;
    const Program& program;
    const Call& call;
    const Piece& piece;
    const int64_t *addresses, *ids;
    int64_t stride, base, from, size, dim;
    bool has_bitmap;
    const T* plain;          // the values, or null where they are in a format
    const uint8_t* packed;   // the same of integers of so many bits, with scales of 2**shift neighbors each
    const uint8_t* scales;
    int64_t scales_stride, bits;
    int shift;
    float* room;  // for a vector

    SparseVectors(const Program& program, const Call& call, const Piece& piece, const int64_t* addresses, int64_t stride,
                  const int64_t* ids, float* room)
        : program(program), call(call), piece(piece), addresses(addresses), ids(ids), stride(stride), room(room) {
        const Weight& weight = program.weights[piece.weight];
        base = weight.start, from = piece.a, size = piece.rows, dim = piece.width, has_bitmap = piece.kind == BITMAP;
        plain = weight.format == PLAIN ? static_cast<const T*>(call.weights[piece.weight]) : nullptr;
        packed = nullptr;
        if (weight.format != INTEGERS) return;
        const Packed all(program, call, piece);
        if (all.shift < 4) return;
        packed = all.bytes, scales = all.scales, scales_stride = all.scales_stride, bits = all.bits;
        shift = std::min(all.shift, 62);  // of a slab, one for all
    }

    // N integers from one on, which have no more than two scales.
    template <int BITS, int N>
    __attribute__((always_inline)) lanes<N> read_integers(int64_t next) const {
        const auto scale_of = [&](int64_t value) { return scale_at(scales + (value >> shift) * scales_stride); };
        const float first = scale_of(next), second = scale_of(next + N - 1);
        // How many of them have the first one.
        const int64_t own = (((next >> shift) + 1) << shift) - next;
        integers<N> numbers;
        for (int k = 0; k < N; ++k) numbers[k] = k;
        const lanes<N> scale = numbers < static_cast<int>(std::min<int64_t>(own, N)) ? lanes<N>{} + first : lanes<N>{} + second;
        return (to_floats<N>(fields_from<BITS, N>(packed, next)) - zero_of(BITS)) * scale;
    }

    // The same, if there is code for them.
    template <int N>
    __attribute__((always_inline)) bool read_packed(int64_t next, lanes<N>& values) const {
        if constexpr (N > 1 && N <= 16) {
            if (!packed || next + N + 16 > size) return false;  // so that what is read behind them is there
            switch (bits) {
                case 8: return values = read_integers<8, N>(next), true;
                case 4: return values = read_integers<4, N>(next), true;
                case 2: return values = read_integers<2, N>(next), true;
                default: return values = read_integers<1, N>(next), true;
            }
        }
        return false;
    }

    void ask(int64_t) const {}  // which has been done

    template <class F>
    __attribute__((always_inline)) void read(int64_t i, const F& f) const {
        const int64_t address = addresses[i * stride];
        if (!has_bitmap) {
            if (address < 0) std::memset(room, 0, static_cast<size_t>(dim) * sizeof(float));
            else named_columns<T>(program, call, piece, address - base, from + ids[i], room);
            each<D>(fixed<D>(dim), [&](auto d, auto n) __attribute__((always_inline)) { f(d, n, get<n>(room + d)); });
            return;
        }
        const uint64_t* words = bitmap_of(call, piece);
        const int64_t first = (from + ids[i]) * fixed<D>(dim);
        int64_t next = address < 0 ? 0 : address - base;
        each<D>(fixed<D>(dim), [&](auto d, auto n) __attribute__((always_inline)) {
            const uint64_t bits = address < 0 ? 0 : bits_from(words, first + d, n);
            const int64_t count = __builtin_popcountll(bits);
            lanes<n> values = {};
            if (plain && next + n <= size) {
                values = get<n>(plain + next);
            } else if (!read_packed<n>(next, values)) {
                float some[n] = {};
                some_values<T>(program, call, piece, next, count, some);
                values = get<n>(some);
            }
            next += count;
            f(d, n, spread<n>(bits, values));
        });
    }
};
