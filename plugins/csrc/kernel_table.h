// The compiled kernels this library carries. The table itself is generated from the manifest (embed_kernels.py).
#pragma once

#include <cstddef>

namespace bsa {

struct Kernel {
    char const* name;
    char const* entry;
    int dtype;    // bsa_dtype
    int head;     // head size in shared memory
    char role;    // 'd' dense, 's' skip, 'g' general
    bool causal;
    bool joint;   // decides 128 rows together, else 64
    int rows;     // query rows of a work item
    int columns;  // key columns of a loaded tile
    int threads;
    int sharedBytes;
    int boxRows[4];    // of the tensor maps of q, k, v, o
    int boxColumns[4];
    unsigned char const* image;
};

extern Kernel const kKERNELS[];
extern std::size_t const kKERNEL_COUNT;

} // namespace bsa
