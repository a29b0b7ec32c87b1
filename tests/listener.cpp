// A tool that listens to NVTX, as small as one can be: it prints what it is told, a line a call. Declarations are those
// of the injection interface of NVTX 3, whose tables are numbered in nvtxTypes.h.
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

namespace {
using Function = void (*)();
struct Callbacks { size_t size; int (*table)(int module, Function*** out, unsigned* count); };
struct Attributes {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    int64_t payload;
    int32_t message_type;
    const void* message;
};
constexpr int CALLBACKS = 1, CORE2 = 5, INT64 = 2, REGISTERED = 3;
enum { PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };
std::map<uint32_t, std::string> categories;

const void* kept(const char* text) { return new std::string(text); }
const char* text(const void* handle) { return static_cast<const std::string*>(handle)->c_str(); }

const void* create(const char* name) { std::printf("domain %s\n", name); return kept(name); }
const void* string(const void*, const char* text) { return kept(text); }
void category(const void*, uint32_t number, const char* name) { categories[number] = name; }
int push(const void* domain, const Attributes* given) {
    std::string payload = given->payload_type == INT64 ? std::to_string(given->payload) : "none";
    std::printf("push %s | %s | %s | %s\n", text(domain), categories[given->category].c_str(),
                given->message_type == REGISTERED ? text(given->message) : "not registered", payload.c_str());
    return 0;
}
int pop(const void* domain) { std::printf("pop %s\n", text(domain)); return 0; }
}  // namespace

extern "C" int InitializeInjectionNvtx2(const void* (*exported)(uint32_t)) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    Function** table;
    unsigned count;
    auto callbacks = static_cast<const Callbacks*>(exported(CALLBACKS));
    if (!callbacks || !callbacks->table(CORE2, &table, &count) || count <= CREATE_DOMAIN) return 0;
    *table[PUSH] = reinterpret_cast<Function>(push);
    *table[POP] = reinterpret_cast<Function>(pop);
    *table[NAME_CATEGORY] = reinterpret_cast<Function>(category);
    *table[REGISTER_STRING] = reinterpret_cast<Function>(string);
    *table[CREATE_DOMAIN] = reinterpret_cast<Function>(create);
    return 1;
}
