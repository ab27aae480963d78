//! A bounded table whose keys are not used twice, so that a late event of a socket that is gone finds nothing.

const INDEX_BITS: u32 = 20;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;

/// Names an entry of a [`Slab`]; fits 52 bits.
pub type Id = u64;

/// A table of at most `limit` entries.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<(u64, Option<T>)>,
    free: Vec<usize>,
    limit: usize,
    generation: u64,
}

impl<T> Slab<T> {
    /// An empty table.
    pub fn new(limit: usize) -> Self {
        Self { places: Vec::new(), free: Vec::new(), limit: limit.min(INDEX_MASK as usize), generation: 0 }
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Is there no room?
    pub fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Puts in what `make` makes of its future name; `None` when the table is full.
    pub fn insert_with<E>(&mut self, make: impl FnOnce(Id) -> Result<T, E>) -> Option<Result<Id, E>> {
        if self.is_full() {
            return None;
        }
        let index = self.free.last().copied().unwrap_or(self.places.len());
        let generation = (self.generation + 1) & 0xffff_ffff;
        let id = generation << INDEX_BITS | index as u64;
        let value = match make(id) {
            Ok(value) => value,
            Err(error) => return Some(Err(error)),
        };
        self.generation = generation;
        if self.free.pop().is_none() {
            self.places.push((0, None));
        }
        if let Some(place) = self.places.get_mut(index) {
            *place = (generation, Some(value));
        }
        Some(Ok(id))
    }

    /// The entry, if it is still there.
    pub fn get(&self, id: Id) -> Option<&T> {
        let (generation, value) = self.places.get((id & INDEX_MASK) as usize)?;
        value.as_ref().filter(|_| *generation == id >> INDEX_BITS)
    }

    /// The entry, if it is still there.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let (generation, value) = self.places.get_mut((id & INDEX_MASK) as usize)?;
        value.as_mut().filter(|_| *generation == id >> INDEX_BITS)
    }

    /// Takes the entry out.
    pub fn remove(&mut self, id: Id) -> Option<T> {
        self.get(id)?;
        let index = (id & INDEX_MASK) as usize;
        self.free.push(index);
        self.places.get_mut(index)?.1.take()
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.places
            .iter()
            .enumerate()
            .filter_map(|(index, (generation, value))| Some((generation << INDEX_BITS | index as u64, value.as_ref()?)))
    }

    /// The names of all entries.
    pub fn ids(&self) -> Vec<Id> {
        self.iter().map(|(id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_not_used_twice() {
        let mut slab = Slab::new(2);
        let put = |slab: &mut Slab<u8>, value| slab.insert_with(|_| Ok::<_, ()>(value)).map(Result::unwrap);
        let (a, b) = (put(&mut slab, 1).unwrap(), put(&mut slab, 2).unwrap());
        assert_eq!(put(&mut slab, 3), None);
        assert_eq!(slab.remove(a), Some(1));
        assert_eq!(slab.remove(a), None);
        let c = put(&mut slab, 3).unwrap();
        assert_eq!((slab.get(a), slab.get(b), slab.get(c)), (None, Some(&2), Some(&3)));
        *slab.get_mut(c).unwrap() = 4;
        assert_eq!(slab.get_mut(a), None);
        assert_eq!((slab.ids(), slab.len()), (vec![c, b], 2));
        slab.remove(b);
        assert_eq!(slab.insert_with(|_| Err::<u8, _>("no")), Some(Err("no")));
        assert_eq!(slab.len(), 1);
    }
}
