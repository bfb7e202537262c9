/* What TensorRT hands to a plugin, made without TensorRT: dimension expressions, logger, error recorder, context. */
#ifndef BLOCKSKIP_TENSORRT_SIDE_H
#define BLOCKSKIP_TENSORRT_SIDE_H

#include <NvInferRuntime.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <string>

namespace host
{

/* A dimension whose value is known here, although the plugin is told that it is not a constant. */
class Dimension final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr
{
public:
    Dimension(int64_t value, bool isConstant);

    int64_t value() const
    {
        return mValue;
    }

private:
    bool isConstant() const override;
    int64_t getConstantValue() const override;
    bool isSizeTensor() const override;

    int64_t mValue;
    bool mIsConstant;
};

/* Keeps every expression it makes. */
class Expressions final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder
{
public:
    Expressions();
    nvinfer1::IDimensionExpr const* make(int64_t value, bool isConstant);

private:
    nvinfer1::IDimensionExpr const* constant(int64_t value) override;
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation op, nvinfer1::IDimensionExpr const& first,
        nvinfer1::IDimensionExpr const& second) override;
    nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t outputIndex, nvinfer1::IDimensionExpr const& opt,
        nvinfer1::IDimensionExpr const& upper) override;

    std::deque<Dimension> mKept;
};

/* Collects what the plugin says, and prints warnings and errors to standard error. */
class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder
{
public:
    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override;
    nvinfer1::ILogger* findLogger() override;

    int32_t errors() const
    {
        return mErrors.load();
    }

private:
    std::atomic<int32_t> mErrors{0};
};

/* The context TensorRT attaches a plugin to; ours offers no allocator and no recorder, which a plugin must survive. */
class Context final : public nvinfer1::IPluginResourceContext
{
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override;
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override;
};

} // namespace host

#endif
