"""From files to batches: load text, tokenise it, pack it into blocks, mix new blocks with replay, stack them."""
