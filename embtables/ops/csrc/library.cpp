// The CPU library: plain C functions that embtables/ops/native.py calls through ctypes. It knows nothing of PyTorch, so
// that one build serves all of its releases.
#include <cstdint>
#include <cstdlib>
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

// The best that this processor can do, or what EMBTABLES_INSTRUCTIONS names; null where it cannot do that.
inline const Functions* choose() {
    const char* wanted = std::getenv("EMBTABLES_INSTRUCTIONS");
    auto suits = [&](const Functions& f) { return !wanted || !*wanted || !std::strcmp(wanted, f.name); };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && suits(avx512_functions)) return &avx512_functions;
    if (has_avx2 && suits(avx2_functions)) return &avx2_functions;
#endif
    return suits(baseline_functions) ? &baseline_functions : nullptr;
}

inline const Functions* chosen() {
    static const Functions* const functions = choose();
    return functions;
}

inline const Functions& functions() { return *chosen(); }

}  // namespace embtables

namespace {

#if defined(__linux__)
// Whether a library that is loaded has an OpenMP runtime, or was linked with one.
int take_openmp(const char* path) {
    void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return 0;
    if (void* function = dlsym(library, "GOMP_parallel")) {
        embtables::openmp() = reinterpret_cast<embtables::Parallel>(function);
        return 1;  // stays open, so that the address stays good
    }
    dlclose(library);
    return 0;
}
#endif

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

// The sizes of all that Python writes, and a number for changes that leave them as they are: a library of another version
// than embtables/ops/native.py expects is not used.
EXPORT int64_t embtables_version() {
    int64_t version = 15;
    for (size_t size : {sizeof(embtables::Call), sizeof(embtables::Gather), sizeof(embtables::RowUpdate),
                        sizeof(embtables::Lookup), sizeof(embtables::Piece), sizeof(embtables::Weight),
                        sizeof(embtables::Projection), sizeof(embtables::Code)})
        version = (version * 1000 + static_cast<int64_t>(size)) % 1000000000007;
    return version;
}

// Null where EMBTABLES_INSTRUCTIONS asks for what this processor cannot do: no other function may then be called.
EXPORT const char* embtables_instructions() {
    const embtables::Functions* functions = embtables::chosen();
    return functions ? functions->name : nullptr;
}

// DONE, REFUSED_ID or BAD_OFFSETS, when nothing but `values` and `rows` has been written; or OUT_OF_MEMORY.
EXPORT int embtables_forward(const embtables::Call* call) {
    return guarded([&] { return embtables::functions().forward(*call); });
}

// `gradients` says where results go: to the weights themselves with a fused optimizer, else to tensors of gradients.
// DONE or OUT_OF_MEMORY.
EXPORT int embtables_backward(const embtables::Call* call, const embtables::Call* gradients) {
    return guarded([&] {
        embtables::functions().backward(*call, *gradients);
        return embtables::DONE;
    });
}

// Copies the rows that the gradient of this lookup depends on, as they are now, to `saved`; the number of scalars, for
// whose sake alone it is called with null first.
EXPORT int64_t embtables_keep_rows(const embtables::Call* call) { return embtables::functions().keep_rows(*call); }

// DONE, NO_SUCH_ROW or OUT_OF_MEMORY.
EXPORT int embtables_gather(const embtables::Gather* gather) {
    return guarded([&] { return embtables::functions().gather(*gather); });
}

// DONE, NO_SUCH_ROW or OUT_OF_MEMORY.
EXPORT int embtables_update(const embtables::RowUpdate* update) {
    return guarded([&] { return embtables::functions().update(*update); });
}

// Takes the OpenMP runtime that PyTorch uses, else one that is loaded, and returns whether there is any.
EXPORT int embtables_find_openmp() {
#if defined(__linux__)
    if (take_openmp("libtorch_cpu.so")) return 1;
    auto look = [](dl_phdr_info* info, size_t, void*) -> int {
        const char* path = info->dlpi_name ? info->dlpi_name : "";
        const char* slash = std::strrchr(path, '/');
        const char* file = slash ? slash + 1 : path;
        for (const char* runtime : {"libgomp", "libiomp", "libomp"})
            if (!std::strncmp(file, runtime, std::strlen(runtime))) return take_openmp(path);
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
