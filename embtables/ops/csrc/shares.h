// How strongly the L2 of a step pulls each of its ids.
#pragma once
#include <cstdint>
#include <vector>

#include "program.h"

namespace embtables {

// l2 / (n · m) for each id: n, how often its row occurs in training; m, how often it is among the ids of its table.
inline void find_shares(const Shares& s) {
    auto table = [&](int64_t i) { return s.table[s.lookup[i]]; };
    int bits = 1;
    while ((int64_t{1} << bits) < 2 * s.num_ids) ++bits;
    const uint64_t last_slot = (uint64_t{1} << bits) - 1;
    // By a hash of an id and its table, where it stands first; by that place, how often it does.
    std::vector<int64_t> found(last_slot + 1, -1), first(s.num_ids), times(s.num_ids, 0);
    for (int64_t i = 0; i < s.num_ids; ++i) {
        const uint64_t key = static_cast<uint64_t>(s.ids[i]) + static_cast<uint64_t>(table(i)) * 0xD1B54A32D192ED03ull;
        uint64_t slot = (key * 0x9E3779B97F4A7C15ull) >> (64 - bits);
        auto taken = [&](int64_t by) { return by >= 0 && !(s.ids[by] == s.ids[i] && table(by) == table(i)); };
        while (taken(found[slot])) slot = (slot + 1) & last_slot;
        if (found[slot] < 0) found[slot] = i;
        first[i] = found[slot];
        ++times[first[i]];
    }
    for (int64_t i = 0; i < s.num_ids; ++i) {
        const int64_t id = s.ids[i], lookup = s.lookup[i];
        const float count = id >= 0 && id < s.known[lookup] ? s.counts[s.start[lookup] + id] : 1.0f;
        // In the order of PyTorch's, to the last bit.
        s.shares[i] = 1.0f / (count * static_cast<float>(times[first[i]])) * s.l2;
    }
}

}  // namespace embtables
