// The products of few boxes, one class a dtype, because compiling them takes long.
#pragma once

#include "box_embedding_layers.h"

namespace granvit::cuda {

// Up to here the time goes into reading the weights: small tiles, so that every multiprocessor has one.
constexpr int kFewBoxes = 128;
// Up to here products do more on the way than a library's can, in tiles that the second-level cache can feed; beyond,
// it pays to leave products to the library and to go over their results once more.
constexpr int kSomeBoxes = 512;

template <typename T>
class BoxEmbeddingProducts {
 public:
  // Rows of a tile of a product with `num_boxes` rows.
  static int tile_rows(int num_boxes) { return num_boxes <= kFewBoxes ? Small::kRows : Medium::kRows; }

  // Features by w1, activations by w2.
  static void first_layer(const ProductArgs<T>& args, const GeluEpilogue<T>& epilogue, cudaStream_t stream);
  static void second_layer(const ProductArgs<T>& args, const TokenEpilogue<T>& epilogue, cudaStream_t stream);
  // Gradients of the tokens by w2, of the hidden layer by w1.
  static void grad_hidden(const ProductArgs<T>& args, const SlopeEpilogue<T>& epilogue, cudaStream_t stream);
  static void grad_features(const ProductArgs<T>& args, const PlainEpilogue<T>& epilogue, cudaStream_t stream);
  // Gradients of a layer's output by its input, over the boxes.
  static void grad_weights(const ProductArgs<T>& args, const PlainEpilogue<T>& epilogue, cudaStream_t stream);

 private:
  // Rows, columns; those of a warp; slices; bytes of a step; stages; blocks of a multiprocessor.
  using Small = ProductTile<32, 32, 32, 32, 4, 256, 6, 2>;
  using Medium = ProductTile<64, 64, 32, 32, 1, 128, 4, 3>;

  template <typename Tile, bool kInnerA, bool kInnerB, typename Epilogue>
  static void start(const ProductArgs<T>& args, const Epilogue& epilogue, cudaStream_t stream);
  template <bool kInnerA, bool kInnerB, typename Epilogue>
  static void start_by_size(const ProductArgs<T>& args, const Epilogue& epilogue, cudaStream_t stream);
};

}  // namespace granvit::cuda
