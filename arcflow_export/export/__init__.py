"""Write a bundle: trace each part, merge its weights tensor by tensor, appear whole or not at all."""
