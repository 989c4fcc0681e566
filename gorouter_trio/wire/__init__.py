"""What travels: the API's JSON as typed values, the mail between actors, and the codecs between both and bytes.

Nothing is imported here, so that `errors` may name values of `wire.result` without a loop.
"""
