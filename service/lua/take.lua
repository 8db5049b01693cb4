-- prefix, stream, entry, id, worker, most deaths alone -> what `give` says | nil
-- XAUTOCLAIM has given this worker an entry whose worker had not claimed it for too long.
local _, stream, entry, id, worker, most = unpack(ARGV)
return give(stream, entry, id, worker, most)
