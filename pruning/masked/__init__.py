"""Networks whose channels others have masked, made small."""
