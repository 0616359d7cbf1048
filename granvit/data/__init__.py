"""Region data: records, shards, and what training reads from them."""
