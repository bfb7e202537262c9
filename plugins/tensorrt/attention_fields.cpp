#include "attention_fields.h"

#include "attention_inputs.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <variant>

namespace blockskip
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

namespace
{

using FieldPointer = std::variant<int32_t*, float*, std::string*>;

struct FieldSpec
{
    char const* name;
    bool required;
    FieldPointer (*locate)(AttentionFields&);
};

/* One row a field, in the contract's order; everything below walks this table. */
std::array<FieldSpec, 17> const kFIELDS{{
    {"inputs", true, [](AttentionFields& f) -> FieldPointer { return &f.inputs; }},
    {"br", true, [](AttentionFields& f) -> FieldPointer { return &f.br; }},
    {"bc", true, [](AttentionFields& f) -> FieldPointer { return &f.bc; }},
    {"is_causal", true, [](AttentionFields& f) -> FieldPointer { return &f.isCausal; }},
    {"scale", true, [](AttentionFields& f) -> FieldPointer { return &f.scale; }},
    {"softcap", true, [](AttentionFields& f) -> FieldPointer { return &f.softcap; }},
    {"window", true, [](AttentionFields& f) -> FieldPointer { return &f.window; }},
    {"unit", true, [](AttentionFields& f) -> FieldPointer { return &f.unit; }},
    {"prefill_threshold", true, [](AttentionFields& f) -> FieldPointer { return &f.prefill.threshold; }},
    {"prefill_a", true, [](AttentionFields& f) -> FieldPointer { return &f.prefill.a; }},
    {"prefill_b", true, [](AttentionFields& f) -> FieldPointer { return &f.prefill.b; }},
    {"prefill_target", true, [](AttentionFields& f) -> FieldPointer { return &f.prefill.target; }},
    {"decode_threshold", true, [](AttentionFields& f) -> FieldPointer { return &f.decode.threshold; }},
    {"decode_a", true, [](AttentionFields& f) -> FieldPointer { return &f.decode.a; }},
    {"decode_b", true, [](AttentionFields& f) -> FieldPointer { return &f.decode.b; }},
    {"decode_target", true, [](AttentionFields& f) -> FieldPointer { return &f.decode.target; }},
    {"outputs", false, [](AttentionFields& f) -> FieldPointer { return &f.outputs; }},
}};

PluginFieldType typeOf(FieldPointer const& pointer)
{
    if (std::holds_alternative<int32_t*>(pointer))
    {
        return PluginFieldType::kINT32;
    }
    return std::holds_alternative<float*>(pointer) ? PluginFieldType::kFLOAT32 : PluginFieldType::kCHAR;
}

[[noreturn]] void refuse(std::string const& field, std::string const& found, std::string const& expected)
{
    throw std::invalid_argument("field \"" + field + "\": found " + found + ", expected " + expected);
}

/* Attributes have no NUL of their own; whether the parser counts the terminator has changed between versions. */
std::string readText(PluginField const& field)
{
    if (field.type != PluginFieldType::kCHAR)
    {
        refuse(field.name, "field type " + std::to_string(static_cast<int32_t>(field.type)), "a string");
    }
    std::string text(static_cast<char const*>(field.data), static_cast<size_t>(std::max(field.length, 0)));
    text.resize(std::strlen(text.c_str()));
    return text;
}

template <typename T>
T readNumber(PluginField const& field)
{
    if (field.length != 1)
    {
        refuse(field.name, std::to_string(field.length) + " values", "one value");
    }
    switch (field.type)
    {
    case PluginFieldType::kINT32:
        if (std::is_integral_v<T>)
        {
            return static_cast<T>(*static_cast<int32_t const*>(field.data));
        }
        break;
    case PluginFieldType::kINT64:
        if (std::is_integral_v<T>)
        {
            auto const value = *static_cast<int64_t const*>(field.data);
            if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
            {
                refuse(field.name, std::to_string(value), "a 32-bit integer");
            }
            return static_cast<T>(value);
        }
        break;
    case PluginFieldType::kFLOAT32:
        if (std::is_floating_point_v<T>)
        {
            return static_cast<T>(*static_cast<float const*>(field.data));
        }
        break;
    case PluginFieldType::kFLOAT64:
        if (std::is_floating_point_v<T>)
        {
            return static_cast<T>(*static_cast<double const*>(field.data));
        }
        break;
    default: break;
    }
    refuse(field.name, "field type " + std::to_string(static_cast<int32_t>(field.type)),
        std::is_integral_v<T> ? "an integer" : "a floating-point number");
}

void readField(PluginField const& field, FieldPointer const& into)
{
    if (field.data == nullptr)
    {
        refuse(field.name, "no data", "a value");
    }
    if (auto* const* text = std::get_if<std::string*>(&into))
    {
        **text = readText(field);
    }
    else if (auto* const* integer = std::get_if<int32_t*>(&into))
    {
        **integer = readNumber<int32_t>(field);
    }
    else
    {
        *std::get<float*>(into) = readNumber<float>(field);
    }
}

void checkPhase(std::string const& name, PhaseThreshold const& phase)
{
    auto const show = [](float value) { return std::to_string(value); };
    if (!(phase.threshold >= 0.0F && phase.threshold < 1.0F))
    {
        refuse(name + "_threshold", show(phase.threshold), "a number in [0, 1)");
    }
    if (!(phase.a >= 0.0F) || !std::isfinite(phase.a))
    {
        refuse(name + "_a", show(phase.a), "a finite number >= 0");
    }
    // a * exp(b * target) may be as large as it likes: a threshold of 1 or more means dense.
    if (!std::isfinite(phase.b) || !std::isfinite(phase.target))
    {
        refuse(name + "_b, " + name + "_target", show(phase.b) + ", " + show(phase.target), "finite numbers");
    }
}

void checkFields(AttentionFields const& fields)
{
    AttentionInputs{fields.inputs}; // throws with the reason
    if (fields.outputs != "o" && fields.outputs != "o,counts")
    {
        refuse("outputs", "\"" + fields.outputs + "\"", "\"o\" or \"o,counts\"");
    }
    if (fields.br < 1)
    {
        refuse("br", std::to_string(fields.br), "an integer >= 1");
    }
    if (fields.bc < 1)
    {
        refuse("bc", std::to_string(fields.bc), "an integer >= 1");
    }
    if (fields.isCausal != 0 && fields.isCausal != 1)
    {
        refuse("is_causal", std::to_string(fields.isCausal), "0 or 1");
    }
    if (!(fields.scale > 0.0F) || !std::isfinite(fields.scale))
    {
        refuse("scale", std::to_string(fields.scale), "a finite number > 0");
    }
    if (!(fields.softcap >= 0.0F) || !std::isfinite(fields.softcap))
    {
        refuse("softcap", std::to_string(fields.softcap), "a finite number >= 0 (0 = none)");
    }
    if (fields.window < 0)
    {
        refuse("window", std::to_string(fields.window), "an integer >= 0 (0 = none)");
    }
    if (fields.unit != "head" && fields.unit != "group")
    {
        refuse("unit", "\"" + fields.unit + "\"", "\"head\" or \"group\"");
    }
    checkPhase("prefill", fields.prefill);
    checkPhase("decode", fields.decode);
}

} // namespace

float PhaseThreshold::factor() const
{
    return a == 0.0F ? 0.0F : static_cast<float>(double{a} * std::exp(double{b} * double{target}));
}

bool AttentionFields::hasCounts() const
{
    return outputs == "o,counts";
}

std::string AttentionFields::describe() const
{
    // Enough digits to tell any two floats apart: this text identifies a timing-cache entry.
    std::ostringstream text;
    text.precision(std::numeric_limits<float>::max_digits10);
    AttentionFields copy{*this};
    for (FieldSpec const& spec : kFIELDS)
    {
        text << spec.name << '=';
        std::visit([&text](auto* value) { text << *value; }, spec.locate(copy));
        text << ';';
    }
    return text.str();
}

AttentionFields parseFields(PluginFieldCollection const* collection, bool strict)
{
    if (collection == nullptr || (collection->nbFields > 0 && collection->fields == nullptr))
    {
        throw std::invalid_argument("no plugin fields were given");
    }
    AttentionFields fields;
    std::array<bool, kFIELDS.size()> seen{};
    for (int32_t i = 0; i < collection->nbFields; ++i)
    {
        PluginField const& field = collection->fields[i];
        auto const* spec = std::find_if(kFIELDS.begin(), kFIELDS.end(),
            [&field](FieldSpec const& s) { return field.name != nullptr && std::strcmp(s.name, field.name) == 0; });
        if (spec == kFIELDS.end())
        {
            if (strict)
            {
                refuse(field.name == nullptr ? "(no name)" : field.name, "a field this plugin does not know",
                    "a plan built with this version of the plugin; rebuild the engine or load its own library");
            }
            continue;
        }
        readField(field, spec->locate(fields));
        seen[static_cast<size_t>(spec - kFIELDS.begin())] = true;
    }
    for (size_t i = 0; i < kFIELDS.size(); ++i)
    {
        if (!seen[i] && (kFIELDS[i].required || strict))
        {
            refuse(kFIELDS[i].name, "nothing", "a value: version 1 of the op writes every attribute on every node");
        }
    }
    checkFields(fields);
    return fields;
}

PluginFieldCollection const* advertisedFields()
{
    static std::vector<PluginField> const sFields = [] {
        AttentionFields prototype;
        std::vector<PluginField> fields;
        for (FieldSpec const& spec : kFIELDS)
        {
            fields.emplace_back(spec.name, nullptr, typeOf(spec.locate(prototype)), 1);
        }
        return fields;
    }();
    static PluginFieldCollection const sCollection{static_cast<int32_t>(sFields.size()), sFields.data()};
    return &sCollection;
}

SerializedFields::SerializedFields(AttentionFields const& fields)
    : mFields(fields)
{
    for (FieldSpec const& spec : kFIELDS)
    {
        FieldPointer const pointer = spec.locate(mFields);
        if (auto* const* text = std::get_if<std::string*>(&pointer))
        {
            mPluginFields.emplace_back(
                spec.name, (*text)->c_str(), PluginFieldType::kCHAR, static_cast<int32_t>((*text)->size()));
        }
        else
        {
            void const* data = std::visit([](auto* value) -> void const* { return value; }, pointer);
            mPluginFields.emplace_back(spec.name, data, typeOf(pointer), 1);
        }
    }
    mCollection.nbFields = static_cast<int32_t>(mPluginFields.size());
    mCollection.fields = mPluginFields.data();
}

} // namespace blockskip
