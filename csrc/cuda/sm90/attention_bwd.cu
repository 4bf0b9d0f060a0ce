// attention, backward, on sm_90a: the order of the launches.
#include "attention.h"
#include "attention_tiles.h"

namespace fastlm::cuda {

void attention_bwd_sm90(AttentionBackward f, DType dtype, Place place) {
  sm90::check_arguments(f.attention, dtype);
  const OnDevice here(place.device);
  attention_delta(f, dtype, place);
  sm90::attention_dkdv(f, dtype, place);
  if (f.partial) {  // the sums of the table's gradient
    attention_dq(f, dtype, place);
  } else {
    sm90::attention_dq(f, dtype, place);
  }
}

}  // namespace fastlm::cuda
