"""Write a bundle: trace each part, merge its weights tensor by tensor, and rename the finished directory into place."""
