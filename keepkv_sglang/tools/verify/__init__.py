"""`keepkv verify`: does a running server answer as it should, with and without compression?"""
