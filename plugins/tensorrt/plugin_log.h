/* Where the plugin's words go: TensorRT's logger and error recorder; standard error where TensorRT offers no logger. */
#ifndef BLOCKSKIP_PLUGIN_LOG_H
#define BLOCKSKIP_PLUGIN_LOG_H

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace blockskip
{

/* Kept from setLoggerFinder; the finder outlives the library. */
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void logMessage(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept;

/* Logs "method: reason" as an error and reports it to `recorder` where there is one. */
void reportError(nvinfer1::IErrorRecorder* recorder, nvinfer1::ErrorCode code, char const* method,
    char const* reason) noexcept;

/* Runs `body` and returns its value; an exception is reported as an error of `method` and `failed` returned.
 * Every method TensorRT calls goes through here, because none of them may throw. */
template <typename T, typename Body>
T guarded(char const* method, nvinfer1::IErrorRecorder* recorder, T failed, Body&& body) noexcept
{
    try
    {
        return body();
    }
    catch (std::exception const& error)
    {
        reportError(recorder, nvinfer1::ErrorCode::kINVALID_ARGUMENT, method, error.what());
    }
    catch (...)
    {
        reportError(recorder, nvinfer1::ErrorCode::kUNSPECIFIED_ERROR, method, "unknown exception");
    }
    return failed;
}

} // namespace blockskip

#endif
