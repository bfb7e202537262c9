#include "tensorrt_side.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <stdexcept>

namespace host
{

using nvinfer1::DimensionOperation;
using nvinfer1::IDimensionExpr;

Dimension::Dimension(int64_t value, bool isConstant)
    : mValue(value)
    , mIsConstant(isConstant)
{
    mImpl = this;
}

bool Dimension::isConstant() const
{
    return mIsConstant;
}

int64_t Dimension::getConstantValue() const
{
    return mIsConstant ? mValue : std::numeric_limits<int64_t>::min();
}

bool Dimension::isSizeTensor() const
{
    return false;
}

Expressions::Expressions()
{
    mImpl = this;
}

IDimensionExpr const* Expressions::make(int64_t value, bool isConstant)
{
    return &mKept.emplace_back(value, isConstant);
}

IDimensionExpr const* Expressions::constant(int64_t value)
{
    return make(value, true);
}

IDimensionExpr const* Expressions::operation(
    DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second)
{
    int64_t const a = static_cast<Dimension const&>(first).value();
    int64_t const b = static_cast<Dimension const&>(second).value();
    bool const isConstant = first.isConstant() && second.isConstant();
    switch (op)
    {
    case DimensionOperation::kSUM: return make(a + b, isConstant);
    case DimensionOperation::kPROD: return make(a * b, isConstant);
    case DimensionOperation::kMAX: return make(std::max(a, b), isConstant);
    case DimensionOperation::kMIN: return make(std::min(a, b), isConstant);
    case DimensionOperation::kSUB: return make(a - b, isConstant);
    case DimensionOperation::kEQUAL: return make(a == b, isConstant);
    case DimensionOperation::kLESS: return make(a < b, isConstant);
    case DimensionOperation::kFLOOR_DIV: return make(a / b, isConstant);
    case DimensionOperation::kCEIL_DIV: return make((a + b - 1) / b, isConstant);
    }
    return nullptr;
}

IDimensionExpr const* Expressions::declareSizeTensor(
    int32_t /*outputIndex*/, IDimensionExpr const& /*opt*/, IDimensionExpr const& /*upper*/)
{
    return nullptr; // the op has no output whose size depends on data
}

void Logger::log(Severity severity, nvinfer1::AsciiChar const* message) noexcept
{
    if (severity <= Severity::kERROR)
    {
        ++mErrors;
    }
    if (severity <= Severity::kWARNING)
    {
        std::fprintf(stderr, "%s\n", message);
    }
}

nvinfer1::ILogger* Logger::findLogger()
{
    return this;
}

nvinfer1::IGpuAllocator* Context::getGpuAllocator() const noexcept
{
    return nullptr;
}

nvinfer1::IErrorRecorder* Context::getErrorRecorder() const noexcept
{
    return nullptr;
}

} // namespace host
