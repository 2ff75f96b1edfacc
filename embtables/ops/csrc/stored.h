// Rows in other formats than plain scalars (embtables/formats), unpacked one by one. Included by kernels.h, in its
// namespace.

template <int N>
struct Integers {
    typedef int32_t type __attribute__((vector_size(4 * N)));
    typedef uint8_t bytes __attribute__((vector_size(N)));
};

// The integers of up to 32 / BITS neighboring fields of a word, as floats, each less `zero`.
template <int BITS, int N>
inline lanes<N> fields_of(uint32_t word, float zero) {
    typename Integers<N>::type shifts, fields = {};
    for (int i = 0; i < N; ++i) shifts[i] = BITS * i;
    fields += static_cast<int32_t>(word);
    // The sign that an arithmetic shift brings in is not among the bits that are kept.
    return __builtin_convertvector((fields >> shifts) & ((1 << BITS) - 1), lanes<N>) - zero;
}

// N bytes as floats.
template <int N>
inline lanes<N> floats_of(const uint8_t* bytes) {
    if constexpr (N == 1) {
        return static_cast<float>(*bytes);
#if defined(__AVX2__)
    } else if constexpr (N == 8) {  // what compilers make of the vectors below goes byte by byte
        const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
        lanes<8> r;
        std::memcpy(&r, &v, sizeof r);
        return r;
    } else if constexpr (N == 16) {
        const lanes<8> halves[2] = {floats_of<8>(bytes), floats_of<8>(bytes + 8)};
        lanes<16> r;
        std::memcpy(&r, halves, sizeof r);
        return r;
#endif
    } else {
        typename Integers<N>::bytes b;
        std::memcpy(&b, bytes, sizeof b);
        return __builtin_convertvector(__builtin_convertvector(b, typename Integers<N>::type), lanes<N>);
    }
}

// The middle of the integers, which stands for 0.
inline float zero_of(int64_t bits) {
    return bits > 2 ? static_cast<float>(1 << (bits - 1)) : static_cast<float>((1 << bits) - 1) / 2;
}

inline int field_at(const uint8_t* bytes, int64_t bits, int64_t number) {
    const int64_t bit = bits * number;
    return bytes[bit >> 3] >> (bit & 7) & ((1 << bits) - 1);
}

// f(place, number of lanes as a constant, the numbers there) for a packed row of n scalars.
template <int BITS, int W, class F>
inline void each_packed(const uint8_t* bytes, float scale, int32_t n, const F& f) {
    const float zero = zero_of(BITS);
    int32_t d = 0;
    if constexpr (BITS == 8) {
        each<W>(n, [&](int64_t at, auto m) {
            f(at, m, (floats_of<m>(bytes + at) - zero) * scale);
        });
    } else {
        constexpr int N = 32 / BITS < 16 ? 32 / BITS : 16, BYTES = N * BITS / 8;
        for (; d + N <= n; d += N) {
            uint32_t word = 0;
            std::memcpy(&word, bytes + d * BITS / 8, BYTES);
            f(d, std::integral_constant<int, N>{}, fields_of<BITS, N>(word, zero) * scale);
        }
        for (; d < n; ++d) f(d, std::integral_constant<int, 1>{}, (static_cast<float>(field_at(bytes, BITS, d)) - zero) * scale);
    }
}

// What each integer of a row of signs stands for.
inline void levels_of(const bfloat16* scales, int64_t bits, float* levels) {
    for (int q = 0; q < 1 << bits; ++q) {
        float sum = 0;
        for (int64_t j = 0; j < bits; ++j) {
            const float sign = (static_cast<float>(q >> j & 1) - 0.5f) * load(scales + j);
            sum = j ? sum + sign : sign;
        }
        levels[q] = sum;
    }
}

// Where a row of a slab is stored: its unit, its number there, and its scales.
struct Stored {
    const uint8_t* bytes;
    int64_t number;
    const bfloat16* scales;
};

inline Stored stored_at(const Program& program, const Call& call, const Piece& piece, int64_t row) {
    const Weight& w = program.weights[piece.weight];
    const int64_t within = row - w.start - piece.slab, columns = w.unit_bytes(), count = w.num_scales();
    const uint8_t* bytes = static_cast<const uint8_t*>(call.weights[piece.weight]) + piece.unit * columns;
    // Divisions take as long as all the rest.
    const int64_t block = w.share == 1 ? within : w.share == 0 ? 0
                        : (within | w.share) >> 32 ? within / w.share
                                                   : static_cast<uint32_t>(within) / static_cast<uint32_t>(w.share);
    const bfloat16* scales = static_cast<const bfloat16*>(call.scales[piece.weight]) + (piece.block + block) * count;
    if (w.width > 1) return {bytes + within * columns, 0, scales};
    const int64_t bit = within * w.bits;
    return {bytes + (bit >> 3), (bit & 7) / w.bits, scales};
}

// f(place, number of lanes as a constant, the numbers there) for a row in another format than plain scalars.
template <int W, class F>
inline void each_stored(const Program& program, const Call& call, const Piece& piece, int64_t row, const F& f) {
    const Weight& w = program.weights[piece.weight];
    const int32_t n = static_cast<int32_t>(fixed<W>(w.width));
    constexpr auto one = std::integral_constant<int, 1>{};
    if (w.format == HALVES || w.format == BRAINS) {
        const char* values = static_cast<const char*>(call.weights[piece.weight]) + (row - w.start) * n * 2;
        for (int32_t d = 0; d < n; ++d)
            f(d, one, w.format == HALVES ? load(reinterpret_cast<const float16*>(values) + d)
                                         : load(reinterpret_cast<const bfloat16*>(values) + d));
        return;
    }
    const Stored at = stored_at(program, call, piece, row);
    if (w.format == SIGNS) {
        float levels[16];
        levels_of(at.scales, w.bits, levels);
        for (int32_t d = 0; d < n; ++d) f(d, one, levels[field_at(at.bytes, w.bits, at.number + d)]);
        return;
    }
    const float scale = load(at.scales);
    if (w.width == 1) {
        f(0, one, (static_cast<float>(field_at(at.bytes, w.bits, at.number)) - zero_of(w.bits)) * scale);
        return;
    }
    switch (w.bits) {
        case 8: return each_packed<8, W>(at.bytes, scale, n, f);
        case 4: return each_packed<4, W>(at.bytes, scale, n, f);
        case 2: return each_packed<2, W>(at.bytes, scale, n, f);
        default: return each_packed<1, W>(at.bytes, scale, n, f);
    }
}
