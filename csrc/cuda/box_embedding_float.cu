// The products of box_embedding, float32.
#include "box_embedding_launch.h"

namespace granvit::cuda {

template class BoxEmbeddingProducts<float>;

}  // namespace granvit::cuda
