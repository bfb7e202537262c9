// Looking up kernels in the table.
#pragma once

#include "kernel_table.h"

#include <limits>
#include <string>
#include <vector>

namespace bsa {

// Compute capability, times ten, as people write it: 90 -> "9.0".
std::string capabilityName(int capability);

// The architectures compiled in, as ["sm_80", "sm_90a"].
std::string architectureList();

// Their compute capabilities, times ten.
std::vector<int> capabilitiesCompiled();

// What a call needs; `capability` 0 takes any architecture.
struct Wanted {
    Family family;
    int capability;
    int dtype;
    int head;
    char role;
    bool causal{false};
    bool joint{false};
    int maxRows{std::numeric_limits<int>::max()}; // query rows of a work item at most
};

// The kernel that fits, of several the one with the largest work items, or null. `causal` and `joint` are compared
// where the role depends on them: a general prefill kernel asks for causality at run time, a dense one decides nothing.
Kernel const* find(Wanted const& wanted);

// Why `find` has no kernel: left out of this build, or compiled for other devices only.
std::string whyMissing(Wanted const& wanted);

} // namespace bsa
