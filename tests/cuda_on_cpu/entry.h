// What every library of kernels for tests has beside the kernels: errors as text, and on the CPU the settings of
// block.h. Python calls it by the names below.
#pragma once

#include <exception>
#include <string>

#include "cuda/device.h"

// Null, or what went wrong.
template <typename Function>
const char* error_of(Function function) {
  static std::string error;
  try {
    function();
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}

#ifndef __CUDACC__
extern "C" {

void set_schedule(uint64_t schedule) { device_host::schedule = schedule; }
void set_max_shared_bytes(size_t bytes) { device_host::max_shared_bytes = bytes; }
void set_multiprocessors(int count) { device_host::multiprocessors = count; }
void set_absent_barrier(const char* place) { device_host::absent_barrier = place; }

// Since the last call; one to a line.
const char* barriers_met() {
  static std::string places;
  places.clear();
  for (const device_host::Place& place : device_host::barriers_met) places += place.text() + "\n";
  device_host::barriers_met.clear();
  return places.c_str();
}

void record_launches(bool on) { device_host::recording = on; }

// Since the last call, one to a line: the kernel's offset in this library, blocks, threads of each, dynamic shared
// bytes.
const char* recorded_launches() {
  static std::string lines;
  lines.clear();
  for (const device_host::Launch& launch : device_host::launches) {
    for (size_t number : {launch.kernel, launch.blocks, launch.threads, launch.shared_bytes}) {
      lines += std::to_string(number) + " ";
    }
    lines += "\n";
  }
  device_host::launches.clear();
  return lines.c_str();
}
}
#endif
