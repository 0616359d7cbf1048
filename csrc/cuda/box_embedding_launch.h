// Definitions of BoxEmbeddingProducts, for the files that compile it for one dtype each.
#pragma once

#include "box_embedding_products.h"
#include "host.h"

namespace granvit::cuda {

template <typename T>
template <typename Tile, bool kInnerA, bool kInnerB, typename Epilogue>
void BoxEmbeddingProducts<T>::start(const ProductArgs<T>& args, const Epilogue& epilogue, cudaStream_t stream) {
  const char* op = "box_embedding";
  const int64_t row_blocks = (int64_t{args.rows} + Tile::kRows - 1) / Tile::kRows;
  const int64_t column_blocks = (int64_t{args.columns} + Tile::kColumns - 1) / Tile::kColumns;
  launch(op, box_embedding_product_kernel<T, Tile, kInnerA, kInnerB, Epilogue>,
         dim3(grid_blocks(op, row_blocks * column_blocks)), dim3(kProductThreads), Tile::kSharedBytes, stream, args,
         epilogue);
}

template <typename T>
template <bool kInnerA, bool kInnerB, typename Epilogue>
void BoxEmbeddingProducts<T>::start_by_size(const ProductArgs<T>& args, const Epilogue& epilogue, cudaStream_t stream) {
  if (args.rows <= kFewBoxes)
    start<Small, kInnerA, kInnerB>(args, epilogue, stream);
  else
    start<Medium, kInnerA, kInnerB>(args, epilogue, stream);
}

template <typename T>
void BoxEmbeddingProducts<T>::first_layer(const ProductArgs<T>& args, const GeluEpilogue<T>& epilogue,
                                          cudaStream_t stream) {
  start_by_size<true, true>(args, epilogue, stream);
}

template <typename T>
void BoxEmbeddingProducts<T>::second_layer(const ProductArgs<T>& args, const TokenEpilogue<T>& epilogue,
                                           cudaStream_t stream) {
  start_by_size<true, true>(args, epilogue, stream);
}

template <typename T>
void BoxEmbeddingProducts<T>::grad_hidden(const ProductArgs<T>& args, const SlopeEpilogue<T>& epilogue,
                                          cudaStream_t stream) {
  start_by_size<true, false>(args, epilogue, stream);
}

template <typename T>
void BoxEmbeddingProducts<T>::grad_features(const ProductArgs<T>& args, const PlainEpilogue<T>& epilogue,
                                            cudaStream_t stream) {
  start_by_size<true, false>(args, epilogue, stream);
}

template <typename T>
void BoxEmbeddingProducts<T>::grad_weights(const ProductArgs<T>& args, const PlainEpilogue<T>& epilogue,
                                           cudaStream_t stream) {
  start<Medium, false, false>(args, epilogue, stream);
}

}  // namespace granvit::cuda
