"""Where two runs part: the call, the layer and the stage of a bundle that makes an error, and why.

Every stage of every layer is run alone, on the reference's own input, so that an error is charged to the stage that
makes it and not to those that it flows through.
"""
