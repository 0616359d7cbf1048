// The pybind11 module granvit._C. Each op registers its own schema and kernels in csrc/cpu/<op>.cpp; here is what
// Python needs beside them: what was built, which instruction set runs, and host work that Python is too slow for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/isa.h"
#include "packing.h"

#define GRANVIT_STRING(x) GRANVIT_STRING_(x)
#define GRANVIT_STRING_(x) #x

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled core of granvit: CPU kernels, and what they were built with.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = GRANVIT_COMPILER;
        info["flags"] = GRANVIT_FLAGS;
        info["cpu_targets"] = granvit::cpu::compiled_isas();
        info["torch_built_with"] = GRANVIT_TORCH_VERSION;
        info["torch_target"] = "2.10";
        info["pybind11"] = GRANVIT_STRING(PYBIND11_VERSION_MAJOR) "." GRANVIT_STRING(PYBIND11_VERSION_MINOR);
        info["cpp_standard"] = static_cast<long>(__cplusplus);
        return info;
      },
      "What the extension was built with: compiler, flags, CPU targets and versions.");
  m.def(
      "cpu_isa", [] { return granvit::cpu::isa_name(granvit::cpu::isa_level()); },
      "Name of the instruction set whose kernels run here: the widest compiled one that this processor has.");
  m.def("pack_sequences", &granvit::pack_sequences, py::arg("lengths"), py::arg("capacity"),
        py::call_guard<py::gil_scoped_release>(), "The bin of every sequence; see granvit.packing.pack.");
}
