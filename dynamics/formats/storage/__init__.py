"""Files and their tensors, whoever wrote them."""
