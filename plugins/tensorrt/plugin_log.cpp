#include "plugin_log.h"

#include <atomic>
#include <cstdio>

namespace blockskip
{

namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

constexpr char kPREFIX[] = "blockskip::BlockSkipSoftmaxAttention: ";

} // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder.store(finder);
}

void logMessage(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept
{
    try
    {
        std::string const text = kPREFIX + message;
        // The finder knows the logger of a running build or execution only. A creator is also called outside of both;
        // then standard error is the one place where nobody filters the reason away.
        nvinfer1::ILoggerFinder* finder = gFinder.load();
        nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger != nullptr)
        {
            logger->log(severity, text.c_str());
        }
        else if (severity <= nvinfer1::ILogger::Severity::kWARNING)
        {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    }
    catch (...)
    {
        // Without memory for a message there is nothing left to say.
    }
}

void reportError(nvinfer1::IErrorRecorder* recorder, nvinfer1::ErrorCode code, char const* method,
    char const* reason) noexcept
{
    try
    {
        std::string const message = std::string{method} + ": " + reason;
        logMessage(nvinfer1::ILogger::Severity::kERROR, message);
        if (recorder != nullptr)
        {
            recorder->reportError(code, message.c_str());
        }
    }
    catch (...)
    {
        // As above.
    }
}

} // namespace blockskip
