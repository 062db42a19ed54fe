// How large the caches are.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

namespace supy {

// The last level's size as the system tells it of one processor: sysconf counts the whole machine of a guest.
inline int64_t cache_bytes() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    std::string text;
    int64_t found = 32 << 20;
    if (file >> text && text.back() == 'K') found = std::atoll(text.c_str()) * 1024;
    return found;
  }();
  return bytes;
}

}  // namespace supy
