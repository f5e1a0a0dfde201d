"""What a row of packed documents lets each token see, and which rank owns which tokens."""
