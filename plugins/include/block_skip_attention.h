/* Block-skip softmax attention on NVIDIA GPUs: the one C function under the PyTorch op and the TensorRT plugin.
 *
 * The library needs no CUDA header and no link against CUDA: it opens libcuda at run time and carries its kernels as
 * compiled device code. Every function is thread-safe, none throws. What is computed is defined by the project's rule
 * (README.md): scores, visibility, running maximum, tile decisions, softmax over the kept tiles.
 *
 * Use:
 *     bsa_params p;
 *     bsa_params_init(&p);                       // sets struct_size, abi_version and every default
 *     p.q = ...; p.batch = ...; ...
 *     size_t bytes = bsa_workspace_size(&p);     // device memory, need not be cleared, one per concurrent launch
 *     p.workspace = ...; p.workspace_bytes = bytes;
 *     bsa_status status = bsa_launch(&p, stream);
 */
#ifndef BLOCK_SKIP_ATTENTION_H
#define BLOCK_SKIP_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#if defined(_WIN32)
#define BSA_API __declspec(dllexport)
#else
#define BSA_API __attribute__((visibility("default")))
#endif

/* Raised whenever a field of bsa_params changes its place or meaning. */
#define BSA_ABI_VERSION 2

typedef enum bsa_status {
    BSA_OK = 0,
    BSA_ERROR_INVALID_ARGUMENT = 1, /* a null params, a wrong struct_size or abi_version, a contradictory size */
    BSA_ERROR_UNSUPPORTED = 2,      /* no kernel for this call; bsa_supported names the reason */
    BSA_ERROR_NO_DRIVER = 3,        /* libcuda.so.1 cannot be opened */
    BSA_ERROR_NO_DEVICE = 4,        /* no current CUDA context and no device to make one on */
    BSA_ERROR_WORKSPACE = 5,        /* workspace missing or smaller than bsa_workspace_size */
    BSA_ERROR_CUDA = 6,             /* the driver refused; bsa_last_error carries its words */
    BSA_ERROR_INTERNAL = 7
} bsa_status;

typedef enum bsa_dtype { BSA_FLOAT16 = 0, BSA_BFLOAT16 = 1 } bsa_dtype;

typedef enum bsa_bias_kind {
    BSA_BIAS_NONE = 0,
    BSA_BIAS_ADDITIVE = 1, /* elements of `dtype`, added after scale and softcap; <= finfo(dtype).min / 2 hides a key */
    BSA_BIAS_BOOL = 2      /* one byte an element, non-zero = attend */
} bsa_bias_kind;

typedef enum bsa_unit { BSA_UNIT_HEAD = 0, BSA_UNIT_GROUP = 1 } bsa_unit;

/* Strides are in elements, for batch, head and sequence; the last dimension has stride 1.
 * [B, H, S, D] contiguous is {H*S*D, S*D, D}; [B, S, H, D] contiguous is {S*H*D, D, H*D}. */
typedef struct bsa_params {
    uint32_t struct_size; /* sizeof(bsa_params) */
    uint32_t abi_version; /* BSA_ABI_VERSION */

    /* Device pointers, 16-byte aligned for q, k, v, o; 0 where not given. */
    const void* q;                 /* [B, Hq, Sq, D] dtype */
    const void* k;                 /* [B, Hk, Sk, D] dtype */
    const void* v;                 /* [B, Hk, Sk, Dv] dtype */
    const void* bias;              /* broadcastable to [B, Hq, Sq, Sk]: strides of 0 where broadcast */
    const void* sinks;             /* [Hq] dtype, or 0: one logit per head that joins the denominator only */
    const int32_t* kv_lengths;     /* [B], or 0: Sk */
    const int32_t* q_start;        /* [B], or 0: Sk - Sq */
    const int32_t* q_lengths;      /* [B], or 0: Sq */
    const float* threshold_scale;  /* [1], or 0: 1.0; multiplies the threshold, so it can change without a new launch setup */
    void* o;                       /* [B, Hq, Sq, Dv] dtype, fully overwritten */
    int32_t* counts;               /* [Hq, 2], or 0: skipped and existing tiles per query head, fully overwritten */
    float* lse;                    /* [B, Hq, Sq] contiguous, or 0: natural log-sum-exp of the kept scores, -inf for empty rows;
                                      where Hopper's kernels skip, D <= 128, of probabilities rounded to the dtype */
    void* workspace;               /* bsa_workspace_size bytes, 256-byte aligned */
    uint64_t workspace_bytes;

    int32_t batch, heads_q, heads_k, seq_q, seq_k, head_dim, head_dim_v;
    int32_t dtype;     /* bsa_dtype of q, k, v, o, sinks and an additive bias */
    int32_t bias_kind; /* bsa_bias_kind */
    int32_t is_causal; /* key j visible to row i iff j <= i + q_start */
    int32_t window;    /* 0: none; else j > i + q_start - window */
    int32_t br, bc;    /* tile of the decision, rows and columns */
    int32_t unit;      /* bsa_unit */
    int32_t kv_splits; /* programs a decode call divides the keys of a head among; 0 chooses. Never changes the result */
    int32_t reserved;  /* 0 */

    int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];
    int64_t bias_stride[4]; /* batch, head, query, key */

    float scale;   /* > 0 */
    float softcap; /* 0: none */

    /* Of the call's phase (decode iff seq_q == 1): lambda = (threshold_factor > 0 ? threshold_factor / L : threshold) *
     * threshold_scale[0], L = kv_lengths[b] or Sk; threshold_factor = a * exp(b * target). A lambda that is >= 1,
     * negative or NaN means dense. */
    float threshold;
    float threshold_factor;
} bsa_params;

/* Sets struct_size, abi_version, and zero or the neutral value everywhere else. */
BSA_API void bsa_params_init(bsa_params* params);

/* Enqueues the attention on `stream` (a CUstream / cudaStream_t, 0 = the default stream) of the current device.
 * Allocates nothing on the device and does not synchronise; may be captured into a CUDA graph once bsa_prepare or a
 * first launch with the same kind of arguments has run on the device. */
BSA_API bsa_status bsa_launch(const bsa_params* params, void* stream);

/* Loads the kernels that `params` would use on the current device, without running them. */
BSA_API bsa_status bsa_prepare(const bsa_params* params);

/* Bytes of device workspace bsa_launch needs for these sizes and options (pointers are not read, only compared with 0). */
BSA_API size_t bsa_workspace_size(const bsa_params* params);

/* The same, enough for every device the library was built for: where a call is planned for more than the current one. */
BSA_API size_t bsa_workspace_size_any_device(const bsa_params* params);

/* 1 if a kernel exists for these sizes and options, else 0 with the reason in `reason` (may be 0; always terminated).
 * Needs no GPU: with no current device it answers for the architectures the library was built for. */
BSA_API int32_t bsa_supported(const bsa_params* params, char* reason, size_t reason_size);

/* "major.minor.patch", the ABI version, and the architectures compiled in, as one JSON object. */
BSA_API const char* bsa_version(void);

BSA_API const char* bsa_status_string(bsa_status status);

/* Words of the last failure in the calling thread ("" if none). */
BSA_API const char* bsa_last_error(void);

#if defined(__cplusplus)
}
#endif

#endif /* BLOCK_SKIP_ATTENTION_H */
