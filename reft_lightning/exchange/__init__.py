"""What is trained here, in the formats of other libraries, and the other way round."""
