// The products of box_embedding, one class a dtype, because compiling them takes long.
#pragma once

#include "box_embedding_layers.h"

namespace granvit::cuda {

// Up to here the time goes into reading the weights: small tiles, so that every multiprocessor has one.
constexpr int kFewBoxes = 128;
constexpr int kSomeBoxes = 1024;

template <typename T>
class BoxEmbeddingProducts {
 public:
  // Rows of a tile of a product with `num_boxes` rows.
  static int tile_rows(int64_t num_boxes) {
    return num_boxes <= kFewBoxes                      ? Small::kRows
           : sizeof(T) == 4 || num_boxes <= kSomeBoxes ? Medium::kRows
                                                       : Large::kRows;
  }

  // Features by w1, activations by w2.
  static void first_layer(const ProductArgs<T>& args, const GeluEpilogue<T>& epilogue, cudaStream_t stream);
  static void second_layer(const ProductArgs<T>& args, const TokenEpilogue<T>& epilogue, cudaStream_t stream);
  // Gradients of the tokens by w2.
  static void grad_hidden(const ProductArgs<T>& args, const SlopeEpilogue<T>& epilogue, cudaStream_t stream);
  // Of few boxes: gradients of the hidden layer by w1, and of a layer's output by its input.
  static void grad_features(const ProductArgs<T>& args, const PlainEpilogue<T>& epilogue, cudaStream_t stream);
  static void grad_weights(const ProductArgs<T>& args, const PlainEpilogue<T>& epilogue, cudaStream_t stream);

 private:
  // Rows, columns; those of a warp; slices; bytes of a step; stages; blocks of a multiprocessor.
  using Small = ProductTile<32, 32, 32, 32, 4, 256, 4, 3>;
  using Medium = ProductTile<64, 64, 32, 32, 1, 128, 4, 3>;
  using Large = ProductTile<128, 128, 64, 64, 1, 128, 3, 2>;

  template <typename Tile, bool kInnerA, bool kInnerB, typename Epilogue>
  static void start(const ProductArgs<T>& args, const Epilogue& epilogue, cudaStream_t stream);
  template <bool kInnerA, bool kInnerB, typename Epilogue>
  static void start_by_size(const ProductArgs<T>& args, const Epilogue& epilogue, cudaStream_t stream);
};

}  // namespace granvit::cuda
