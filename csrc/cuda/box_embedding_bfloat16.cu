// The products of box_embedding, bfloat16.
#include "box_embedding_launch.h"

namespace granvit::cuda {

template class BoxEmbeddingProducts<__nv_bfloat16>;

}  // namespace granvit::cuda
