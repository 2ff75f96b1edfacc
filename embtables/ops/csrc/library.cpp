// The CPU library: plain C functions that embtables/ops/native.py calls through ctypes. It knows nothing of PyTorch, so
// that one build serves all of its releases.
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "program.h"
#include "threads.h"

#define EXPORT __attribute__((visibility("default")))

namespace embtables {

extern const Functions baseline_functions;
#if defined(__x86_64__)
extern const Functions avx2_functions, avx512_functions;
#endif

// The best that this processor can do.
inline const Functions& functions() {
    static const Functions& chosen = []() -> const Functions& {
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
        if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            return avx512_functions;
        if (has_avx2) return avx2_functions;
#endif
        return baseline_functions;
    }();
    return chosen;
}

}  // namespace embtables

namespace {

// Exceptions do not leave the library.
template <class Work>
int guarded(const Work& work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return embtables::OUT_OF_MEMORY;
    }
}

}  // namespace

extern "C" {

// Bumped with every change of the functions or structs below: a library of another version is not used.
EXPORT int64_t embtables_version() { return 1; }

EXPORT const char* embtables_instructions() { return embtables::functions().name; }

// DONE, REFUSED_ID or BAD_OFFSETS, when nothing but `values` and `rows` has been written; or OUT_OF_MEMORY.
EXPORT int embtables_forward(const embtables::Call* call) {
    return guarded([&] { return embtables::functions().forward(*call); });
}

// `gradients` says where results go: to the weights themselves with a fused optimiser, else to tensors of gradients.
// DONE or OUT_OF_MEMORY.
EXPORT int embtables_backward(const embtables::Call* call, const embtables::Call* gradients) {
    return guarded([&] {
        embtables::functions().backward(*call, *gradients);
        return embtables::DONE;
    });
}

// DONE, NO_SUCH_ROW or OUT_OF_MEMORY.
EXPORT int embtables_gather(const embtables::Gather* gather) {
    return guarded([&] { return embtables::functions().gather(*gather); });
}

// DONE or OUT_OF_MEMORY.
EXPORT int embtables_update(const embtables::RowUpdate* update) {
    return guarded([&] {
        embtables::functions().update(*update);
        return embtables::DONE;
    });
}

// Looks for an OpenMP runtime among the libraries that are loaded, and returns whether there is one.
EXPORT int embtables_find_openmp() {
#if defined(__linux__)
    auto look = [](dl_phdr_info* info, size_t, void*) -> int {
        if (!info->dlpi_name || !std::strstr(info->dlpi_name, "omp")) return 0;
        void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        if (!library) return 0;
        if (void* function = dlsym(library, "GOMP_parallel")) {
            embtables::openmp() = reinterpret_cast<embtables::Parallel>(function);
            return 1;  // stays open, so that the address stays good
        }
        dlclose(library);
        return 0;
    };
    return dl_iterate_phdr(look, nullptr);
#else
    return 0;
#endif
}

// Asks for huge pages in memory that nothing has been written to yet.
EXPORT void embtables_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
}
