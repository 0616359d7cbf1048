// The products of box_embedding, float16.
#include "box_embedding_launch.h"

namespace granvit::cuda {

template class BoxEmbeddingProducts<__half>;

}  // namespace granvit::cuda
