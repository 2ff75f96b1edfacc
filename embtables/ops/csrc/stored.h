// Rows as they are stored: as scalars, or in other formats (embtables/formats), unpacked one by one. Included by
// kernels.h, in its namespace.
//
// What reads the rows of a slab has a function read(row, f), which calls f(place, number of lanes as a constant, the
// numbers there). LANES is their number where W, the width, is a constant. ask(row) asks for what read will read. Rows
// count through all weights.

// Asks for the cache lines of some bytes: of BYTES where that is above 0, and of no more than -BYTES where it is below.
template <int64_t BYTES>
__attribute__((always_inline)) inline void ask_for(const void* first, int64_t bytes) {
    const char* at = static_cast<const char*>(first);
    const int64_t n = BYTES > 0 ? BYTES : bytes, steps = BYTES < 0 ? -BYTES : n;
    for (int64_t byte = 0; byte < steps; byte += 64) __builtin_prefetch(at + byte);
    // Powers of two that begin at a multiple of themselves do not end in another line; of others, which have something
    // behind them, that is asked for as well.
    if constexpr (BYTES <= 0) __builtin_prefetch(at + n - 1);
    else if constexpr (64 % BYTES != 0 && BYTES % 64 != 0) __builtin_prefetch(at + n - 1);
}

template <class T, int W>
struct PlainRows {
    static constexpr int LANES = lanes_of<W>();
    const T* first;  // of row 0
    int64_t width;

    __attribute__((always_inline)) void ask(int64_t row) const {
        ask_for<W * static_cast<int64_t>(sizeof(T))>(first + row * fixed<W>(width), width * static_cast<int64_t>(sizeof(T)));
    }

    template <class F>
    __attribute__((always_inline)) void read(int64_t row, const F& f) const {
        const T* values = first + row * fixed<W>(width);
        each_or_twice<W>(fixed<W>(width), [&](auto d, auto n) __attribute__((always_inline)) { f(d, n, get<n>(values + d)); });
    }
};

// Whether rows that are read so can be trained.
template <class Rows>
inline constexpr bool may_be_trained = false;
template <class T, int W>
inline constexpr bool may_be_trained<PlainRows<T, W>> = true;

// The middle of the integers, which stands for 0.
inline float zero_of(int64_t bits) {
    return bits > 2 ? static_cast<float>(1 << (bits - 1)) : static_cast<float>((1 << bits) - 1) / 2;
}

inline int field_at(const uint8_t* bytes, int64_t bits, int64_t number) {
    const int64_t bit = bits * number;
    return bytes[bit >> 3] >> (bit & 7) & ((1 << bits) - 1);
}

// How many fields are unpacked at a time: they fill bytes, and where they are smaller than bytes no more than a word, of
// which the widest registers take two.
template <int BITS, int W>
constexpr int fields_at_once() {
    constexpr int word = REGISTER >= 16 ? 64 : 32;
    constexpr int most = BITS < 8 && word / BITS < REGISTER ? word / BITS : 8 / BITS > REGISTER ? 8 / BITS : REGISTER;
    return W && W < most ? W : most;
}

// N neighboring fields, of which the first begins at a byte.
template <int BITS, int N>
__attribute__((always_inline)) inline integers<N> fields_of(const uint8_t* bytes) {
    if constexpr (BITS * N <= 32) {
        uint32_t word = 0;
        std::memcpy(&word, bytes, (BITS * N + 7) / 8);
        integers<N> shifts, fields = {};
        for (int i = 0; i < N; ++i) shifts[i] = BITS * i;
        fields += static_cast<int32_t>(word);
        // The sign that an arithmetic shift brings in is not among the bits that are kept.
        return (fields >> shifts) & ((1 << BITS) - 1);
#if defined(__AVX512F__)
    } else if constexpr (BITS == 4 && N == 16) {
        const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        const __m512i both = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
        const __m512i words = _mm512_permutexvar_epi32(half, both);
        return bits_as<integers<N>>(_mm512_and_si512(_mm512_srlv_epi32(words, shifts), _mm512_set1_epi32(15)));
    } else if constexpr (N == 16) {  // what compilers make of the vectors below goes byte by byte
        return bits_as<integers<N>>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
#endif
#if defined(__AVX2__)
    } else if constexpr (N == 8) {
        return bits_as<integers<N>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#endif
    } else {
        typedef uint8_t eights __attribute__((vector_size(N)));
        eights fields;
        std::memcpy(&fields, bytes, sizeof fields);
        return __builtin_convertvector(fields, integers<N>);
    }
}

// The same from field `first` on, which may begin within a byte. Up to a byte, and less than one field more, is read behind
// them.
template <int BITS, int N>
__attribute__((always_inline)) inline integers<N> fields_from(const uint8_t* bytes, int64_t first) {
    if constexpr (BITS == 8) {
        return fields_of<8, N>(bytes + first);
    } else {
        static_assert(BITS * N <= 64, "");
        const uint8_t* at = bytes + (BITS * first >> 3);
        const int shift = static_cast<int>(BITS * first & 7);
        uint64_t word = 0;
        std::memcpy(&word, at, (BITS * N + 7) / 8);
        // In two steps, since there is no shift by 64.
        const uint64_t behind = static_cast<uint64_t>(at[(BITS * N + 7) / 8]) << (8 * ((BITS * N + 7) / 8) - 1 - shift) << 1;
        word = word >> shift | behind;
        uint8_t aligned[8];
        std::memcpy(aligned, &word, sizeof aligned);
        return fields_of<BITS, N>(aligned);
    }
}

// f(place, number of lanes as a constant, the integers there) for a row of n fields.
template <int BITS, int W, class F>
__attribute__((always_inline)) inline void each_field(const uint8_t* bytes, int64_t n, const F& f) {
    constexpr int N = fields_at_once<BITS, W>();
    if constexpr (W != 0) {
        static_assert(W % N == 0, "");
        auto some = [&](auto d, auto) __attribute__((always_inline)) {
            f(d, std::integral_constant<int, N>{}, fields_of<BITS, N>(bytes + d * BITS / 8));
        };
        each_of<N>(std::make_integer_sequence<int, W / N>{}, some);
    } else {
        int64_t d = 0;
        for (; d + N <= n; d += N) f(d, std::integral_constant<int, N>{}, fields_of<BITS, N>(bytes + d * BITS / 8));
        if constexpr (N > 8)
            for (; d + 8 <= n; d += 8) f(d, std::integral_constant<int, 8>{}, fields_of<BITS, 8>(bytes + d * BITS / 8));
        for (; d < n; ++d) f(d, std::integral_constant<int, 1>{}, field_at(bytes, BITS, d));
    }
}

// Where the rows of a slab are packed, and their scales.
struct Packed {
    const uint8_t* bytes;    // of the slab, as the scales are
    const uint8_t* scales;
    int64_t first;           // number of the slab's first row
    int64_t width, bits, unit_bytes, share;
    int64_t scales_stride;   // bytes from the scales of some rows to those of the next ones
    int shift;               // instead of a division, where rows that have their scales in common are a power of two

    Packed(const Program& program, const Call& call, const Piece& piece) {
        const Weight& w = program.weights[piece.weight];
        width = w.width, bits = w.bits, unit_bytes = w.unit_bytes, share = w.share;
        bytes = static_cast<const uint8_t*>(call.weights[piece.weight]) + piece.unit * unit_bytes;
        if (w.scales_in_rows()) {
            scales = bytes + w.scalar_bytes(), scales_stride = unit_bytes;
        } else {
            scales_stride = 2 * w.num_scales();
            scales = static_cast<const uint8_t*>(call.scales[piece.weight]) + piece.block * scales_stride;
        }
        first = w.start + piece.slab;
        shift = share == 0 ? 63 : share & (share - 1) ? -1 : __builtin_ctzll(static_cast<uint64_t>(share));
    }

    __attribute__((always_inline)) const uint8_t* scales_of(int64_t row) const {
        const int64_t within = row - first;
        const int64_t block = __builtin_expect(shift >= 0, 1) ? within >> shift : within / share;
        return scales + block * scales_stride;
    }

    __attribute__((always_inline)) const uint8_t* row_at(int64_t row) const { return bytes + (row - first) * unit_bytes; }

    // COLUMNS: the bytes of a row's scalars, or 0. Scales behind a row lie in the line where it ends.
    template <int COLUMNS>
    __attribute__((always_inline)) void ask_packed(int64_t row) const {
        ask_for<COLUMNS>(row_at(row), unit_bytes);
        __builtin_prefetch(scales_of(row));
    }
};

// A scale of a row, which may begin at any byte.
inline float scale_at(const uint8_t* scales, int64_t number = 0) {
    bfloat16 scale;
    std::memcpy(&scale, scales + number * static_cast<int64_t>(sizeof scale), sizeof scale);
    return load(&scale);
}

// Integers times a scale.
template <int BITS, int W>
struct IntegerRows : Packed {
    static constexpr int LANES = fields_at_once<BITS, W>(), COLUMNS = (BITS * W + 7) / 8;

    __attribute__((always_inline)) void ask(int64_t row) const { ask_packed<COLUMNS>(row); }

    template <class F>
    __attribute__((always_inline)) void read(int64_t row, const F& f) const {
        const float scale = scale_at(scales_of(row)), zero = zero_of(BITS);
        each_field<BITS, W>(row_at(row), fixed<W>(width), [&](auto d, auto n, auto q) __attribute__((always_inline)) {
            f(d, n, (to_floats<n>(q) - zero) * scale);
        });
    }
};

// The sum of half of each scale, with the sign that its bit says.
template <int N>
__attribute__((always_inline)) inline lanes<N> sum_of_signs(integers<N> q, const uint8_t* scales, int64_t bits) {
    lanes<N> sum = {};
    for (int64_t j = 0; j < bits; ++j) {
        const lanes<N> sign = (to_floats<N>(q >> static_cast<int>(j) & 1) - 0.5f) * scale_at(scales, j);
        sum = j ? sum + sign : sign;
    }
    return sum;
}

template <int BITS, int W>
struct SignRows : Packed {
    static constexpr int LANES = fields_at_once<BITS, W>(), COLUMNS = (BITS * W + 7) / 8;

    __attribute__((always_inline)) void ask(int64_t row) const { ask_packed<COLUMNS>(row); }

    template <class F>
    __attribute__((always_inline)) void read(int64_t row, const F& f) const {
        const uint8_t* own = scales_of(row);
        each_field<BITS, W>(row_at(row), fixed<W>(width), [&](auto d, auto n, auto q) __attribute__((always_inline)) {
            f(d, n, sum_of_signs<n>(q, own, BITS));
        });
    }
};

// Rows of one scalar each, several to a byte.
struct PackedScalars : Packed {
    static constexpr int LANES = 1;
    bool are_signs;

    void ask(int64_t row) const {
        __builtin_prefetch(bytes + ((row - first) * bits >> 3));
        __builtin_prefetch(scales_of(row));
    }
    template <class F>
    void read(int64_t row, const F& f) const {
        const int64_t bit = (row - first) * bits;
        const int field = bytes[bit >> 3] >> (bit & 7) & ((1 << bits) - 1);
        constexpr auto one = std::integral_constant<int, 1>{};
        if (are_signs) return f(0, one, sum_of_signs<1>(field, scales_of(row), bits));
        f(0, one, (static_cast<float>(field) - zero_of(bits)) * scale_at(scales_of(row)));
    }
};

// Narrow rows that are no floats are read by the code for any width.
constexpr bool has_own_code(int64_t width) { return width >= 16; }

// Calls g with what reads the rows of a piece's slab. They are W wide where W is not 0.
template <class T, int W, class G>
inline void with_rows(const Program& program, const Call& call, const Piece& piece, const G& g) {
    const Weight& w = program.weights[piece.weight];
    const void* values = call.weights[piece.weight];
    auto plain = [&](auto* first) { g(PlainRows<std::decay_t<decltype(*first)>, W>{first - w.start * w.width, w.width}); };
    if constexpr (!std::is_same<T, float>::value) {  // then all weights are plain
        plain(static_cast<const T*>(values));
    } else if (w.format == PLAIN) {
        plain(static_cast<const float*>(values));
    } else if constexpr (W == 0 || W == 1 || has_own_code(W)) {
        if (w.format == HALVES) return plain(static_cast<const float16*>(values));
        if (w.format == BRAINS) return plain(static_cast<const bfloat16*>(values));
        const Packed packed(program, call, piece);
        const bool signs = w.format == SIGNS;
        if constexpr (W <= 1) {
            if (w.width == 1) return g(PackedScalars{packed, signs});
        }
        if constexpr (W != 1) {
            switch (w.bits) {
                case 8: return g(IntegerRows<8, W>{packed});
                case 4: return signs ? g(SignRows<4, W>{packed}) : g(IntegerRows<4, W>{packed});
                case 2: return signs ? g(SignRows<2, W>{packed}) : g(IntegerRows<2, W>{packed});
                default: return signs ? g(SignRows<1, W>{packed}) : g(IntegerRows<1, W>{packed});
            }
        }
    }
}
