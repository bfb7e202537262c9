// The argument list of a kernel launch.
#pragma once

#include "../include/block_skip_attention.h"
#include "driver.h"
#include "given.h"

#include <cstdint>
#include <initializer_list>

namespace bsa {

// Pointers to the arguments in the kernel's order (build_kernels.py lists it), then two pointers of Triton's own that
// stay null. What is added must outlive the launch call; the call's parameters are copied here for that.
class Arguments {
public:
    explicit Arguments(bsa_params const& p)
        : params(p)
        , given(givenBy(p))
        , mScaling(p)
    {
    }

    Arguments(Arguments const&) = delete; // its pointers point into it
    Arguments& operator=(Arguments const&) = delete;

    bsa_params params;
    std::int32_t given;

    template <typename... T>
    void add(T&... values)
    {
        ((mPointers[mCount++] = &values), ...);
    }

    // A tensor map is followed by sizes and strides the kernels do not read.
    void addMap(TensorMap& map)
    {
        add(map, mZero32, mZero32, mZero32, mZero32, mZero64, mZero64, mZero64, mZero64);
    }

    // The numbers that decide what a score counts.
    void addScaling()
    {
        add(mScaling.scaleLog2, params.threshold, params.threshold_factor, params.window, mScaling.softcapLog2,
            mScaling.softcapRate);
    }

    void addStrides()
    {
        for (auto* strides : {params.q_stride, params.k_stride, params.v_stride, params.o_stride})
        {
            add(strides[0], strides[1], strides[2]);
        }
    }

    void addBiasStrides()
    {
        add(params.bias_stride[0], params.bias_stride[1], params.bias_stride[2], params.bias_stride[3]);
    }

    void addScratch()
    {
        add(mZero64, mZero64);
    }

    void** data()
    {
        return mPointers;
    }

private:
    Scaling mScaling;
    void* mPointers[80]{};
    int mCount{0};
    std::int32_t mZero32{0};
    std::int64_t mZero64{0};
};

} // namespace bsa
