// Scores one request with a package of `torchrec-amort export`, without Python.
//
//   score_package PACKAGE INPUTS OUTPUT [OPERATORS]
//
// INPUTS is a dict of lists of float32 tensors as torch.save writes it, the embeddings and dense inputs of one request
// with n events of each history and m candidates, in the order of the package's manifest: `events_0` and so on, [n, W]
// of each feature of a history's events, `request_dense`, [1, I_r] alone, `request_bags`, [1, W] each, `candidate_dense`,
// [m, I_c] alone, `candidate_bags`, [m, W] each, and `items`, [m, W] of each feature by which candidates read a history,
// history by history; numbers stand for themselves, [n, I] or [m, I]; n and m at least 1. OUTPUT gets the
// logits [m, T], row by row, as float32. A service keeps the history's state from one request to the next, and
// looks the embeddings up itself: the tables are in tables.pt. OPERATORS is the library that the package's manifest
// names, from the folder torchrec_amort/ops of an install with this torch.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

using Tensors = std::vector<at::Tensor>;
using Loader = torch::inductor::AOTIModelPackageLoader;

static c10::Dict<c10::IValue, c10::IValue> read_inputs(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return torch::pickle_load(bytes).toGenericDict();
}

int main(int count, char** arguments) try {
  if (count != 4 && count != 5) throw std::runtime_error("usage: score_package PACKAGE INPUTS OUTPUT [OPERATORS]");
  // The library makes its operators known while it is loaded; the packages look for them.
  if (count == 5 && dlopen(arguments[4], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  const c10::InferenceMode inference;
  const std::string package = arguments[1];
  const auto has = [&](const std::string& program) { return std::ifstream(package + "/" + program).good(); };
  const auto inputs = read_inputs(arguments[2]);
  Tensors given;
  const auto give = [&](const Tensors& tensors) { given.insert(given.end(), tensors.begin(), tensors.end()); };
  const auto input = [&](const std::string& name) {
    Tensors tensors;
    for (const c10::IValue& tensor : inputs.at(name).toListRef()) tensors.push_back(tensor.toTensor());
    return tensors;
  };

  // Phase one, once per request.
  for (int place = 0; has("history_" + std::to_string(place) + ".pt2"); ++place)
    give(Loader(package + "/history_" + std::to_string(place) + ".pt2").run(input("events_" + std::to_string(place))));
  Tensors of_request = input("request_dense");
  for (const at::Tensor& bag : input("request_bags")) of_request.push_back(bag);
  give(has("request.pt2") ? Loader(package + "/request.pt2").run(of_request) : of_request);

  // Phase two.
  Loader candidates(package + "/candidates.pt2");
  for (const char* name : {"candidate_dense", "candidate_bags", "items"}) give(input(name));
  std::vector<double> milliseconds;
  at::Tensor logits;
  for (int turn = 0; turn < 20; ++turn) {
    const auto started = std::chrono::steady_clock::now();
    logits = candidates.run(given).at(0);
    milliseconds.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());

  logits = logits.contiguous();
  std::ofstream output(arguments[3], std::ios::binary);
  output.write(static_cast<const char*>(logits.data_ptr()), logits.nbytes());
  if (!output) throw std::runtime_error(std::string(arguments[3]) + ": cannot be written");
  std::cout << logits.size(0) << " candidates scored; phase two takes " << milliseconds[10] << " ms (median of 20)\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
