// The compiled kernels this library carries. The table itself is generated from the manifest (embed_kernels.py).
#pragma once

#include <cstddef>

namespace bsa {

// What a kernel belongs to: its arguments, its launch and the meaning of its role follow from it.
enum class Family : char
{
    kHOPPER = 'h', // prefill in Gluon for compute capability 9.0
    kDECODE = 'd', // few query rows, KV split over CTAs; plain Triton
    kPREFILL = 'p', // prefill in plain Triton
};

struct Kernel {
    char const* name;
    char const* entry;
    Family family;
    char const* target; // as ptxas is told: "sm_90a"
    int architecture;   // its compute capability, times ten
    bool exact;         // runs on that capability alone ("a"); else also on later ones of the same generation
    int dtype;        // bsa_dtype
    int head;         // head size it is shaped for; narrower heads are filled up with zeros
    char role;        // prefill: 'd' dense, 's' skip, 'g' general; decode: 's' scores, 'v' values, 'c' combine
    bool causal;
    bool joint;   // decides 128 rows together, else 64
    bool early;   // may be launched before the kernel in front of it has ended
    int rows;     // query rows of a work item
    int columns;  // key columns of a loaded tile
    int threads;
    int sharedBytes;
    int boxRows[4];    // of the tensor maps of q, k, v, o; zero where a kernel takes pointers
    int boxColumns[4];
    unsigned char const* image;

    bool runsOn(int capability) const noexcept
    {
        return exact ? capability == architecture
                     : capability / 10 == architecture / 10 && capability >= architecture;
    }
};

extern Kernel const kKERNELS[];
extern std::size_t const kKERNEL_COUNT;

} // namespace bsa
