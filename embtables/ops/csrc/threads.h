// Threads. The library uses the OpenMP runtime that PyTorch has loaded, by its address: a second runtime, or threads
// of our own, would compete with PyTorch's, which go on spinning for a while after each of its operations.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

namespace embtables {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline std::atomic<Parallel>& openmp() {
    static std::atomic<Parallel> function{nullptr};
    return function;
}

// Calls work(0) … work(parts - 1). Which thread does which part, and how many threads there are, does not matter to it.
// Throws std::bad_alloc where a part did: nothing else is thrown in there.
template <class Work>
void in_parallel(int64_t parts, const Work& work) {
    if (parts <= 1) {
        if (parts == 1) work(0);
        return;
    }
    struct Shared {
        const Work* work;
        int64_t parts;
        std::atomic<int64_t> next{0};
        std::atomic<bool> out_of_memory{false};
    } shared{&work, parts};
    auto run = [](void* pointer) {
        auto* s = static_cast<Shared*>(pointer);
        for (int64_t part; (part = s->next.fetch_add(1)) < s->parts;) {
            try {
                (*s->work)(part);
            } catch (const std::bad_alloc&) {
                s->out_of_memory = true;
            }
        }
    };
    if (Parallel parallel = openmp().load()) {
        parallel(run, &shared, static_cast<unsigned>(parts), 0);
    } else {
        std::vector<std::thread> threads;
        threads.reserve(static_cast<std::size_t>(parts));
        try {
            for (int64_t i = 1; i < parts; ++i) threads.emplace_back(run, &shared);
        } catch (...) {
            // No memory or no permission for another thread: those there are do its parts.
        }
        run(&shared);
        for (auto& thread : threads) thread.join();
    }
    if (shared.out_of_memory) throw std::bad_alloc();
}

}  // namespace embtables
