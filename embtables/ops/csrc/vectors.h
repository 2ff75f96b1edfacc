// Arithmetic on stretches of scalars, some at a time. Included by kernels.h, in its namespace.
//
// With the number of scalars a constant, compilers unroll plain loops before they vectorize them, and miss most of it;
// vector types say what is meant on every instruction set.

template <int N>
struct Lanes {
    typedef float type __attribute__((vector_size(4 * N)));
};
template <>
struct Lanes<1> {
    typedef float type;
};
template <int N>
using lanes = typename Lanes<N>::type;

template <int N>
inline lanes<N> get(const float* p) {
    lanes<N> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int N>
inline float get(const bfloat16* p) {
    return load(p);
}
template <int N>
inline float get(const float16* p) {
    return load(p);
}

template <int N>
inline void put(float* p, lanes<N> v) {
    std::memcpy(p, &v, sizeof v);
}
template <int N>
inline void put(bfloat16* p, float v) {
    store(p, v);
}
template <int N>
inline void put(float16* p, float v) {
    store(p, v);
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

// f(place, number of lanes as a constant) for all of n scalars: W of them, where W is not 0.
template <int W, class T = float, class F>
inline void each(int64_t n, const F& f) {
    if constexpr (W == 0 || !std::is_same<T, float>::value) {
        int64_t i = 0;
        if constexpr (std::is_same<T, float>::value) {
            for (; i + 16 <= n; i += 16) f(i, std::integral_constant<int, 16>{});
            if (i + 8 <= n) f(i, std::integral_constant<int, 8>{}), i += 8;
            if (i + 4 <= n) f(i, std::integral_constant<int, 4>{}), i += 4;
        }
        for (; i < n; ++i) f(i, std::integral_constant<int, 1>{});
    } else {
        constexpr int N = W < 16 ? W : 16;
        static_assert(W % N == 0 && (N & (N - 1)) == 0, "");
#pragma GCC unroll 4
        for (int i = 0; i < W; i += N) f(i, std::integral_constant<int, N>{});
    }
}

// Σ a·b in running sums, sixteen where there are as many, that are added up in a fixed order.
template <int W, class T>
inline float dot(const float* a, const T* b, int64_t n) {
    constexpr bool plain = std::is_same<T, float>::value;
    if constexpr (W != 0 && plain) {
        constexpr int N = W < 16 ? W : 16;
        lanes<N> sum = {};
#pragma GCC unroll 4
        for (int i = 0; i < W; i += N) sum += get<N>(a + i) * get<N>(b + i);
        return sum_of<N>(sum);
    } else {
        lanes<16> sum = {};
        int64_t i = 0;
        if constexpr (plain) {
            for (; i + 16 <= n; i += 16) sum += get<16>(a + i) * get<16>(b + i);
        } else {
            for (; i + 16 <= n; i += 16)
                for (int j = 0; j < 16; ++j) sum[j] += a[i + j] * load(b + i + j);
        }
        float rest = 0;
        for (; i < n; ++i) rest += a[i] * load(b + i);
        return sum_of<16>(sum) + rest;
    }
}
