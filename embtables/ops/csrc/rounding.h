// Stochastic rounding to bfloat16, as embtables/ops/stochastic.py has it. Included by kernels.h, in its namespace.

// What all random bits of one step follow from, for the weight of a width.
inline uint64_t stream_of(int64_t step, int64_t width) {
    return mix(mix(static_cast<uint64_t>(step)) ^ static_cast<uint64_t>(width));
}

// Scalars of a weight that is trained in bfloat16: read as they are, and written with random bits of their own. It is
// added to and passed on as a pointer is.
struct Rounded {
    bfloat16* at;
    uint64_t place;  // among the scalars of the weight
    uint64_t stream;

    Rounded operator+(int64_t n) const { return {at + n, place + static_cast<uint64_t>(n), stream}; }
};

inline uint32_t random_bits(uint64_t stream, uint64_t place) {
    return static_cast<uint32_t>(mix(stream + (place >> 2)) >> (place & 3) * 16) & 0xffff;
}

template <int N>
inline lanes<N> get(Rounded row) {
    return get<N>(row.at);
}

template <int N>
inline void put(Rounded row, lanes<N> v) {
    if constexpr (N == 1) {
        const uint32_t bits = bits_as<uint32_t>(v);
        const bool is_none = (bits & 0x7fffffff) > 0x7f800000;
        row.at->bits = static_cast<uint16_t>(is_none ? 0x7fc0 : (bits + random_bits(row.stream, row.place)) >> 16);
    } else {
        uint16_t drawn[N];
        if (N % 4 == 0 && row.place % 4 == 0) {  // four of them are one hash, as it lies in memory
            uint64_t hashes[(N + 3) / 4];
            for (int i = 0; i < N / 4; ++i) hashes[i] = mix(row.stream + (row.place >> 2) + static_cast<uint64_t>(i));
            std::memcpy(drawn, hashes, sizeof drawn);
        } else {
            for (int i = 0; i < N; ++i)
                drawn[i] = static_cast<uint16_t>(random_bits(row.stream, row.place + static_cast<uint64_t>(i)));
        }
        const words<N> bits = bits_as<words<N>>(v), random = words_of<N>(drawn);
        const words<N> is_none = bits_as<words<N>>((bits & 0x7fffffff) > 0x7f800000);
        const auto halves = __builtin_convertvector((is_none & 0x7fc0) | (~is_none & ((bits + random) >> 16)),
                                                    typename Lanes<N>::halves);
        std::memcpy(row.at, &halves, sizeof halves);
    }
}

// Where scalars lie, and how many bytes each takes.
template <class T>
inline const char* bytes_at(const T* values) {
    return reinterpret_cast<const char*>(values);
}
inline const char* bytes_at(Rounded row) { return bytes_at(row.at); }

template <class Row>
constexpr int64_t scalar_bytes = sizeof(std::remove_pointer_t<Row>);
template <>
inline constexpr int64_t scalar_bytes<Rounded> = sizeof(bfloat16);
