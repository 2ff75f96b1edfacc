// Arithmetic on stretches of scalars, some at a time. Included by kernels.h, in its namespace.
//
// With the number of scalars a constant, compilers unroll plain loops before they vectorize them, and miss most of it;
// vector types say what is meant on every instruction set.

// As many floats as a register has. Longer vectors than that are kept in memory, at every operation on them.
#if defined(__AVX512F__)
constexpr int REGISTER = 16;
#elif defined(__AVX2__)
constexpr int REGISTER = 8;
#else
constexpr int REGISTER = 4;
#endif

template <int N>
struct Lanes {
    typedef float floats __attribute__((vector_size(4 * N)));
    typedef int32_t ints __attribute__((vector_size(4 * N)));
    typedef uint32_t words __attribute__((vector_size(4 * N)));
    typedef uint16_t halves __attribute__((vector_size(2 * N)));
};
template <>
struct Lanes<1> {
    typedef float floats;
    typedef int32_t ints;
};
template <int N>
using lanes = typename Lanes<N>::floats;
template <int N>
using integers = typename Lanes<N>::ints;
template <int N>
using words = typename Lanes<N>::words;

// The bits of one value as another of as many.
template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <int N>
inline lanes<N> to_floats(integers<N> v) {
    if constexpr (N == 1) {
        return static_cast<float>(v);
    } else {
        return __builtin_convertvector(v, lanes<N>);
    }
}

template <int N>
inline words<N> words_of(const void* halves) {
    typename Lanes<N>::halves v;
    std::memcpy(&v, halves, sizeof v);
    return __builtin_convertvector(v, words<N>);
}

template <int N>
inline lanes<N> get(const float* p) {
    lanes<N> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int N>
inline lanes<N> get(const bfloat16* p) {
    if constexpr (N == 1) {
        return load(p);
    } else {
        return bits_as<lanes<N>>(words_of<N>(p) << 16);
    }
}
template <int N>
inline lanes<N> get(const float16* p) {
    if constexpr (N == 1) {
        return load(p);
    } else {
        const words<N> half = words_of<N>(p), low = (half & 0x7fff) << 13, shifted = low + (112u << 23);
        // Subnormal: 2**-14 with the bits behind it, less 2**-14. Infinite or no number: the greatest exponent here too.
        const lanes<N> small = bits_as<lanes<N>>(shifted + (1u << 23)) - 0x1p-14f;
        const words<N> is_small = bits_as<words<N>>(low < (1u << 23)), is_top = bits_as<words<N>>(low >= (31u << 23));
        const words<N> magnitude = (is_small & bits_as<words<N>>(small)) | (~is_small & (shifted + (is_top & (112u << 23))));
        return bits_as<lanes<N>>((half & 0x8000) << 16 | magnitude);
    }
}

template <int N>
inline void put(float* p, lanes<N> v) {
    std::memcpy(p, &v, sizeof v);
}
template <int N>
inline void put(bfloat16* p, lanes<N> v) {
    if constexpr (N == 1) {
        store(p, v);
    } else {
        const words<N> bits = bits_as<words<N>>(v);
        const words<N> is_none = bits_as<words<N>>((bits & 0x7fffffff) > 0x7f800000);
        const words<N> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const auto halves = __builtin_convertvector((is_none & 0x7fc0) | (~is_none & rounded), typename Lanes<N>::halves);
        std::memcpy(p, &halves, sizeof halves);
    }
}
__attribute__((noinline)) inline void store_all(float16* p, const float* values, int n) {
    for (int i = 0; i < n; ++i) store(p + i, values[i]);
}
template <int N>
inline void put(float16* p, lanes<N> v) {
    float values[N];
    std::memcpy(values, &v, sizeof v);
    store_all(p, values, N);
}

template <int N>
inline lanes<N> root(lanes<N> v) {
    if constexpr (N == 1) {
        return std::sqrt(v);
    } else {
        lanes<N> r;
        for (int i = 0; i < N; ++i) r[i] = __builtin_sqrtf(v[i]);
        return r;
    }
}

// The sum of the lanes: halves are added until one lane is left.
template <int N>
inline float sum_of(lanes<N> v) {
    if constexpr (N == 1) {
        return v;
    } else {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
        // Without it the compiler goes through memory.
        if constexpr (N == 16)
            return sum_of<8>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                             __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
        if constexpr (N == 8)
            return sum_of<4>(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
        if constexpr (N == 4)
            return sum_of<2>(__builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3));
#endif
        lanes<N / 2> low, high;
        std::memcpy(&low, &v, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return sum_of<N / 2>(low + high);
    }
}

// f(place, number of lanes as a constant) for all of W scalars, N at a time.
template <int N, class F, int... I>
__attribute__((always_inline)) inline void each_of(std::integer_sequence<int, I...>, const F& f) {
    (f(std::integral_constant<int, I * N>{}, std::integral_constant<int, N>{}), ...);
}

// A width W that is not known before is 0, or below 0 if it is known to be at most -W and to fill all vectors but the last.
template <int W>
constexpr int lanes_of() {
    if (W < 0 && -W <= REGISTER) return -W / 2;
    return W > 0 && W < REGISTER ? W : REGISTER;
}

// f(place, number of lanes as a constant) for all of n scalars: W of them, where W is above 0.
template <int W, class F>
__attribute__((always_inline)) inline void each(int64_t n, const F& f) {
    if constexpr (W <= 0) {
        int64_t i = 0;
        for (; i + REGISTER <= n; i += REGISTER) f(i, std::integral_constant<int, REGISTER>{});
        if constexpr (REGISTER > 8)
            if (i + 8 <= n) f(i, std::integral_constant<int, 8>{}), i += 8;
        if constexpr (REGISTER > 4)
            if (i + 4 <= n) f(i, std::integral_constant<int, 4>{}), i += 4;
        for (; i < n; ++i) f(i, std::integral_constant<int, 1>{});
    } else {
        constexpr int N = W < REGISTER ? W : REGISTER;
        static_assert(W % N == 0 && (N & (N - 1)) == 0, "");
        each_of<N>(std::make_integer_sequence<int, W / N>{}, f);
    }
}

// Where the last of several vectors is, which number NUMBER has.
template <int NUMBER>
struct LastPlace {
    int64_t place;
    operator int64_t() const { return place; }
};
template <int N, int PLACE>
constexpr int number_of(std::integral_constant<int, PLACE>) {
    return PLACE / N;
}
template <int N, int NUMBER>
constexpr int number_of(LastPlace<NUMBER>) {
    return NUMBER;
}

// As `each`, with as many vectors for a width below 0 as for the greatest such width: the last of them begins within the
// one before it. So f must be such that some scalars may be met twice.
template <int W, class F>
__attribute__((always_inline)) inline void each_or_twice(int64_t n, const F& f) {
    if constexpr (W >= 0) {
        each<W>(n, f);
    } else {
        constexpr int N = lanes_of<W>(), last = -W / N - 1;
        each_of<N>(std::make_integer_sequence<int, last>{}, f);
        f(LastPlace<last>{n - N}, std::integral_constant<int, N>{});
    }
}

// Σ a·b in running sums, sixteen where there are as many, that are added up in a fixed order.
template <int W, class T>
inline float dot(const float* a, const T* b, int64_t n) {
    if constexpr (W > 0) {
        constexpr int N = W < 16 ? W : 16;
        lanes<N> sum = {};
#pragma GCC unroll 4
        for (int i = 0; i < W; i += N) sum += get<N>(a + i) * get<N>(b + i);
        return sum_of<N>(sum);
    } else {
        lanes<16> sum = {};
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) sum += get<16>(a + i) * get<16>(b + i);
        float rest = 0;
        for (; i < n; ++i) rest += a[i] * load(b + i);
        return sum_of<16>(sum) + rest;
    }
}
