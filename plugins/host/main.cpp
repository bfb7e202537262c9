/* Walks the TensorRT plugin without TensorRT: blockskip_plugin_host LIBRARY PLAN [--run DIRECTORY]
 *                                            blockskip_plugin_host LIBRARY --fields
 *
 * For every node and profile of the plan it does what TensorRT does with a plugin: creator, fields, clone, build
 * capability (types, shapes, formats, configuration, workspace), serialisation, creation for the runtime, context,
 * shapes. With --run, also enqueue on a GPU for the profiles that have data; outputs go to DIRECTORY. --fields prints
 * the fields that the creator advertises.
 * One JSON object a line on standard output. Exit code: 0 all walked, 1 a step failed, 2 usage. */

#include "plugin_library.h"
#include "tensorrt_side.h"
#include "walk_build.h"
#include "walk_plan.h"
#include "walk_run.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

namespace
{

std::string quoted(std::string const& text)
{
    std::string result = "\"";
    for (char c : text)
    {
        if (c == '"' || c == '\\')
        {
            result += '\\';
        }
        result += c == '\n' ? ' ' : c;
    }
    return result + "\"";
}

void walkNode(host::PluginLibrary const& library, host::Node const& node, host::Gpu* gpu, std::string const& directory)
{
    host::Plugin const built = library.createForBuild(node);
    host::Plugin const loaded = host::throughPlan(library, *built, node.name);
    for (host::Profile const& profile : node.profiles)
    {
        host::BuildAnswer const answer = host::walkBuild(*built, profile);
        host::walkShapes(*loaded, profile);
        std::printf("{\"node\": %s, \"profile\": %s, \"combinations\": %d, \"workspace\": %zu",
            quoted(node.name).c_str(), quoted(profile.name).c_str(), answer.combinations, answer.workspace);
        if (gpu != nullptr && profile.hasData())
        {
            std::printf(", \"milliseconds\": %.5f",
                host::walkGpu(*loaded, node, profile, answer.workspace, *gpu, directory));
        }
        std::printf("}\n");
    }
}

/* Types as the op contract calls them. */
void printFields(nvinfer1::PluginFieldCollection const& fields)
{
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        nvinfer1::PluginFieldType const type = fields.fields[i].type;
        char const* kind = type == nvinfer1::PluginFieldType::kINT32 ? "int"
            : type == nvinfer1::PluginFieldType::kFLOAT32            ? "float"
            : type == nvinfer1::PluginFieldType::kCHAR               ? "string"
                                                                     : "unknown";
        std::printf("{\"name\": %s, \"kind\": \"%s\"}\n", quoted(fields.fields[i].name).c_str(), kind);
    }
}

} // namespace

int main(int argc, char** argv)
{
    bool const run = argc == 5 && std::strcmp(argv[3], "--run") == 0;
    if (argc != 3 && !run)
    {
        std::fprintf(stderr, "usage: %s LIBRARY PLAN [--run DIRECTORY]\n       %s LIBRARY --fields\n", argv[0], argv[0]);
        return 2;
    }
    host::Logger logger;
    std::string where = argv[2];
    try
    {
        host::PluginLibrary const library{argv[1], logger};
        if (std::strcmp(argv[2], "--fields") == 0)
        {
            printFields(library.fields());
            return 0;
        }
        std::unique_ptr<host::Gpu> const gpu = run ? std::make_unique<host::Gpu>() : nullptr;
        if (gpu != nullptr)
        {
            std::printf("{\"gpu\": %s}\n", quoted(gpu->name()).c_str());
        }
        for (host::Node const& node : host::readPlan(argv[2]))
        {
            where = node.name;
            walkNode(library, node, gpu.get(), run ? argv[4] : "");
        }
    }
    catch (std::exception const& error)
    {
        std::printf("{\"failed\": %s, \"reason\": %s}\n", quoted(where).c_str(), quoted(error.what()).c_str());
        return 1;
    }
    return logger.errors() == 0 ? 0 : 1;
}
