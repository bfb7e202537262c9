/* The library's entry points. TensorRT calls setLoggerFinder and getCreators when it loads the library (load_library,
 * trtexec --dynamicPlugins, or out of an engine it is embedded in); nothing here links against TensorRT. */

#include "attention_creator.h"
#include "block_skip_attention.h"
#include "plugin_log.h"

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#define BLOCKSKIP_EXPORT extern "C" __attribute__((visibility("default")))

BLOCKSKIP_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    blockskip::setFinder(finder);
}

BLOCKSKIP_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static blockskip::AttentionCreator sCreator;
    static nvinfer1::IPluginCreatorInterface* const sCreators[] = {&sCreator};
    nbCreators = 1;
    return sCreators;
}

/* One JSON object: the TensorRT headers this was compiled with, the plugin's version, the kernel library's own words.
 * The engine builder reads it before it hands the library to TensorRT. */
BLOCKSKIP_EXPORT char const* blockskipPluginInfo()
{
    static std::string const sInfo = std::string{"{\"tensorrt_headers\": \""} + std::to_string(NV_TENSORRT_MAJOR) + "."
        + std::to_string(NV_TENSORRT_MINOR) + "." + std::to_string(NV_TENSORRT_PATCH)
        + "\", \"plugin_version\": \"1\", \"kernels\": " + bsa_version() + "}";
    return sInfo.c_str();
}
